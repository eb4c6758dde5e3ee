"""Small values for tests: one character is one token, a thought ends with a newline.

Token log-probs are -1, -2, -3, ... from where a rollout began to sample, as `FakeGenerator` says.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_srpo.advantages import GroupNormalized
from megatron_srpo.algorithm import collect_groups, to_samples
from megatron_srpo.config import Config
from megatron_srpo.engines.fake import EOS, CharTokenizer, FakeGenerator
from megatron_srpo.protocols import Reward
from megatron_srpo.resets import RULES
from megatron_srpo.rewards.exact import last_line
from megatron_srpo.rewards.judge import InPlace, RewardJudge
from megatron_srpo.rollouts import Roles
from megatron_srpo.seeding import counter_seed
from megatron_srpo.thoughts import split_thoughts
from megatron_srpo.types import Group, Prompt, Request, Reset, Rollout, Sample, Score

TOKENIZER = CharTokenizer()
DEFAULTS: dict[str, Any] = {
    "run_dir": "run",
    "model": "model",
    "reward": "last_line",
    "data": {"train": "train.jsonl", "max_prompt_tokens": 8},
    "algorithm": {"resets": "self", "num_prompts": 2, "num_rollouts": 8, "split": "1x4"},
    "thoughts": {"delimiter": "\n", "max_tokens": 4},
    "localize": {"template": "{prompt}{response}?", "max_tokens": 16},
    "rollout": {"max_response_tokens": 24, "max_model_len": 128},
    "eval": {"sets": {"held_out": {"data": "held_out.jsonl"}}},
}


def config(**overrides: Any) -> Config:
    """Sections are merged into the defaults: `config(algorithm={"resets": "none"})`."""
    merged = DEFAULTS | {
        key: DEFAULTS.get(key, {}) | value if isinstance(value, dict) else value
        for key, value in overrides.items()
    }
    return Config.model_validate(merged)


def prompt(
    text: str = "p=", *, id: str = "p", answer: str = "1", solution: tuple[str, ...] = ()
) -> Prompt:
    return Prompt(
        id=id, text=text, token_ids=TOKENIZER.encode(text), answer=answer, solution=solution
    )


def rollout(
    text: str,
    *,
    id: str = "r",
    of: Prompt | None = None,
    reward: float = 0.0,
    failure: str | None = None,
    num_copied: int = 0,
    cfg: Config | None = None,
    **fields: Any,
) -> Rollout:
    """`text` and an end of sequence; correct if `reward` is 1."""
    token_ids = np.append(TOKENIZER.encode(text), np.int32(EOS))
    logprobs = [-1.0 - i for i in [*range(num_copied), *range(len(token_ids) - num_copied)]]
    known: dict[str, Any] = {
        "stage": "suffix" if num_copied else "base",
        "finish_reason": "stop",
        "num_cached_tokens": 0,
        "weight_version": 0,
    }
    return Rollout(
        id=id,
        prompt=of or prompt(),
        token_ids=token_ids,
        logprobs=np.array(logprobs, np.float32),
        num_copied=num_copied,
        thoughts=split_thoughts(token_ids, TOKENIZER, (cfg or config()).thoughts),
        score=Score(value=reward, correct=reward == 1.0, failure=failure),
        **known | fields,
    )


def group(*rollouts: Rollout, resets: tuple[Reset, ...] = (), **fields: Any) -> Group:
    return Group(prompt=rollouts[0].prompt, rollouts=rollouts, resets=resets, **fields)


def rewarded(*rewards: float, text: str = "abc") -> Group:
    """Rollouts that differ in nothing but their rewards."""
    return group(*(rollout(text, id=f"r{i}", reward=r) for i, r in enumerate(rewards)))


def sample(id: str, tokens: Sequence[int], **fields: Any) -> Sample:
    """Entry t of weight, advantage and log-prob is told apart: t + .1, t + .2 and -t - .3."""
    positions = np.arange(len(tokens), dtype=np.float32)
    known: dict[str, Any] = {
        "loss_weight": positions + np.float32(0.1),
        "advantage": positions + np.float32(0.2),
        "logprob": -positions - np.float32(0.3),
        "count": 1.0,
    }
    return Sample(id=id, token_ids=np.array(tokens, np.int32), **known | fields)


def scripted(answers: Mapping[str, str], *, run_seed: int = 0) -> FakeGenerator:
    """Answers by name: "step/prompt/stage/index", or a seed's name and "/localize".

    The names become seeds, so a request with another seed has no answer.
    """
    by_draw = {
        random.Random(counter_seed(run_seed, name)).random(): text for name, text in answers.items()
    }
    return FakeGenerator(lambda context, rng: by_draw[rng.random()])


def responses(stage: str, *texts: str, id: str = "p", step: int | str = 0) -> dict[str, str]:
    """Names for `scripted`: one text per index of a stage."""
    return {f"{step}/{id}/{stage}/{index}": text for index, text in enumerate(texts)}


def in_place(reward: Reward) -> RewardJudge:
    """Asks a reward that is at hand, in this process."""
    return RewardJudge([InPlace(reward)])


def collect(
    generator: FakeGenerator,
    *prompts: Prompt,
    cfg: Config | None = None,
    step: int = 0,
    reward: Reward = last_line,
) -> list[Group]:
    """One step with the rule that the config names."""
    cfg = cfg or config()
    rule = RULES[cfg.algorithm.resets](cfg, TOKENIZER)
    roles = Roles(generator=generator, tokenizer=TOKENIZER, judge=in_place(reward), rule=rule)
    return collect_groups(prompts or [prompt()], step=step, roles=roles, cfg=cfg)


def samples_of(groups: Sequence[Group], cfg: Config | None = None) -> list[Sample]:
    """With the group-normalised credit that the config describes."""
    cfg = cfg or config()
    return to_samples(groups, GroupNormalized(cfg), cfg)


def text_of(token_ids: Any) -> str:
    """Every token shown, an end of sequence as $."""
    return "".join(piece or "$" for piece in TOKENIZER.pieces(token_ids))


def requests(generator: FakeGenerator, purpose: str) -> list[Request]:
    """Those that were made for one purpose, in order."""
    return [r for batch in generator.seen for r in batch if r.purpose == purpose]


def ids(group: Group) -> list[str]:
    return [rollout.id for rollout in group.rollouts]


def names(stage: str, num: int, id: str = "p") -> list[str]:
    return [f"0/{id}/{stage}/{index}" for index in range(num)]


MIXED_BASE = responses("base", "5\n1", "5\n6\n2", "5\n7", "1")
"""Right, wrong, wrong, right."""
SUFFIXES = responses("suffix", "1", "8\n1", "9", "1")
"""After "5\\n": right, right, wrong, right."""
NAMED = MIXED_BASE | SUFFIXES | {"0/p/base/1/localize": r"\boxed{2}"}

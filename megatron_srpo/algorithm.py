"""GRPO, RRPO and SRPO, start to finish, on plain values: read this file first.

    prompts -> base rollouts -> failed seeds -> resets -> suffix rollouts -> groups -> samples

GRPO  N fresh rollouts of a prompt form one group.
RRPO  B fresh rollouts form a group. The first failed one, the seed, is reset to the start of a
      *random* thought, and R = N - B suffixes from there form a second group.
SRPO  the same, but the policy itself names the thought that went wrong first.

A group is rollouts that left the same state, so their rewards are comparable. The rest follows:
a prompt without a failed rollout spends its resets on fresh rollouts (one group of N), and so
does a reset to the first thought, which is a reset to the prompt. The three methods differ in
the rule that is passed in. Each stage is one stream of requests over all prompts of a replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.protocols import CreditRule, Generator, ResetRule, Reward, Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.thoughts import split_thoughts
from megatron_srpo.types import Group, Prompt, Request, Reset, Rollout, Sample, Start


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Who does the work: any engine, reward and rule that keep their protocols."""

    generator: Generator
    tokenizer: Tokenizer
    reward: Reward
    rule: ResetRule


def collect_groups(
    prompts: Sequence[Prompt], *, step: int, roles: Roles, cfg: Config
) -> list[Group]:
    """One step's rollouts, grouped. Every prompt gets exactly `num_rollouts` of them."""
    num_base, num_suffixes = cfg.algorithm.num_base, cfg.algorithm.num_suffixes
    roll = partial(roll_out, step=step, roles=roles, cfg=cfg)

    # 1. Base: independent rollouts from the prompt.
    flat = roll([Start(prompt=p, stage="base", index=i) for p in prompts for i in range(num_base)])
    base = [flat[i * num_base : (i + 1) * num_base] for i in range(len(prompts))]

    # 2. Resets: a prompt's first failed rollout goes back to before the thought that is blamed.
    seeds = [first_failed(rollouts) if num_suffixes else None for rollouts in base]
    failed = [seed for seed in seeds if seed is not None]
    chosen = iter(roles.rule.choose(failed, roles.generator, step) if failed else ())
    resets = [leave_room(next(chosen), seed, cfg) if seed is not None else None for seed in seeds]

    # 3. Suffixes: independent rollouts from there; fresh ones where nothing failed.
    states = list(zip(prompts, seeds, resets, strict=True))
    rest = roll([start_again(*state, index=i) for state in states for i in range(num_suffixes)])

    # 4. Groups: rollouts are comparable only if they left the same state.
    groups: list[Group] = []
    for i, (prompt, reset) in enumerate(zip(prompts, resets, strict=True)):
        fresh, again = tuple(base[i]), tuple(rest[i * num_suffixes : (i + 1) * num_suffixes])
        if reset is None or reset.thought == 0:
            groups.append(Group(prompt=prompt, rollouts=fresh + again, reset=reset))
        else:
            groups.append(Group(prompt=prompt, rollouts=fresh))
            groups.append(Group(prompt=prompt, rollouts=again, reset=reset))
    return groups


def first_failed(rollouts: Sequence[Rollout]) -> Rollout | None:
    """The seed. It stays in its group: taking it out would bias the base rewards upwards."""
    return next((r for r in rollouts if not r.score.correct and r.score.failure is None), None)


def leave_room(reset: Reset, seed: Rollout, cfg: Config) -> Reset:
    """The reset itself, or one to the last thought before it that leaves room for a thought."""
    thought, room = reset.thought, cfg.rollout.max_response_tokens - cfg.thoughts.max_tokens
    while thought > 0 and seed.thoughts[thought].start > room:
        thought -= 1
    if thought == reset.thought:
        return reset
    return replace(reset, thought=thought, moved_from=reset.thought)


def start_again(prompt: Prompt, seed: Rollout | None, reset: Reset | None, *, index: int) -> Start:
    """From the reset state; from the prompt where there is none."""
    if seed is None or reset is None:
        return Start(prompt=prompt, stage="extra", index=index)
    kept = slice(seed.thoughts[reset.thought].start)
    ids, logprobs = seed.token_ids[kept], seed.logprobs[kept]
    return Start(prompt=prompt, stage="suffix", index=index, token_ids=ids, logprobs=logprobs)


def roll_out(starts: Sequence[Start], *, step: int, roles: Roles, cfg: Config) -> list[Rollout]:
    """Continue each start to its end; score the whole response while others still generate."""
    by_id = {f"{step}/{s.prompt.id}/{s.stage}/{s.index}": s for s in starts}
    requests = [
        Request(
            id=id,
            purpose=start.stage,
            context=np.concatenate([start.prompt.token_ids, start.token_ids]),
            max_tokens=cfg.rollout.max_response_tokens - len(start.token_ids),
            temperature=cfg.rollout.temperature,
            seed=counter_seed(cfg.seed, id),
        )
        for id, start in by_id.items()
    ]
    rollouts: dict[str, Rollout] = {}
    for new in roles.generator.generate(requests):
        start = by_id[new.request_id]
        token_ids = np.concatenate([start.token_ids, new.token_ids])
        thoughts = split_thoughts(token_ids, roles.tokenizer, cfg.thoughts)
        rollouts[new.request_id] = Rollout(
            id=new.request_id,
            prompt=start.prompt,
            stage=start.stage,
            token_ids=token_ids,
            logprobs=np.concatenate([start.logprobs, new.logprobs]),
            num_copied=len(start.token_ids),
            thoughts=thoughts,
            score=roles.reward(start.prompt, "".join(thought.text for thought in thoughts)),
            finish_reason=new.finish_reason,
            num_cached_tokens=new.num_cached_tokens,
            weight_version=new.weight_version,
        )
    return [rollouts[id] for id in by_id]


def to_samples(groups: Sequence[Group], credit: CreditRule) -> list[Sample]:
    """Groups -> training sequences, blind to the method: weight and advantage say it all."""
    samples: list[Sample] = []
    for group, credits in zip(groups, credit.assign(groups), strict=True):
        for rollout, (loss_weight, advantage) in zip(group.rollouts, credits, strict=True):
            prompt = rollout.prompt.token_ids
            pad = np.zeros(len(prompt), np.float32)
            samples.append(
                Sample(
                    id=rollout.id,
                    token_ids=np.concatenate([prompt, rollout.token_ids]),
                    loss_weight=np.concatenate([pad, loss_weight]),
                    advantage=np.concatenate([pad, advantage]),
                    logprob=np.concatenate([pad, rollout.logprobs]),
                    count=float(loss_weight.sum()),
                )
            )
    return samples

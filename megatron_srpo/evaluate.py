"""How good is the policy on problems that it was not trained on?   prompts -> attempts -> pass@k

pass@k is the chance that one of k responses to a problem is right, estimated without bias from n
responses of which c are right: 1 - C(n - c, k) / C(n, k)  (Chen et al. 2021, arXiv 2107.03374).

A response whose reward failed has no verdict: it is counted in `failure_rate` and left out of n. A
problem with fewer than k verdicts is left out of pass@k; where that is every problem, there is no
such metric.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Literal

from megatron_srpo.config import Config
from megatron_srpo.metrics import Sums
from megatron_srpo.protocols import Generator, Judge, Tokenizer
from megatron_srpo.rewards.judge import RewardJudge
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import Completion, Prompt, Request, Score

RESPONSES = "responses.jsonl"
"""In the folder that `megatron-srpo eval --out` makes: an `Attempt` a line."""
CONFIG = "config.yaml"
"""Beside it: what it was made with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Problems to be measured on, and who judges the responses."""

    name: str
    """In `eval.sets`."""
    prompts: Sequence[Prompt]
    judge: RewardJudge

    def share(self, replica: int, num_replicas: int) -> HeldOut:
        """Every so-many-th problem."""
        return replace(self, prompts=self.prompts[replica::num_replicas])


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A scored response to a held-out problem."""

    set: str
    prompt_id: str
    seed: int | None
    """Which of the `eval.num_seeds` evaluations it belongs to; None: the greedy response."""
    index: int
    """Tells apart the `eval.num_samples` responses to a problem."""
    text: str
    score: Score
    num_tokens: int
    """A sampled end-of-sequence token included."""
    finish_reason: Literal["stop", "length"]


Draw = tuple[Prompt, int | None, int]
"""Problem, seed, index."""


def evaluate(
    held_out: HeldOut, *, generator: Generator, tokenizer: Tokenizer, judge: Judge, cfg: Config
) -> list[Attempt]:
    """All responses to each problem, in the problems' order. `judge`: the set's, or what asks it.

    What is drawn depends on neither step nor neighbours, so evaluations of two policies are
    paired. The nucleus, if any, is the rollouts' (`rollout.top_p`).
    """
    draws = {_id(held_out.name, draw): draw for draw in _draws(held_out.prompts, cfg)}
    finished: list[tuple[Completion, str]] = []

    def responses() -> Iterator[tuple[Prompt, str]]:
        for new in generator.generate([_request(id, draw, cfg) for id, draw in draws.items()]):
            text = "".join(tokenizer.pieces(new.token_ids))
            finished.append((new, text))
            yield draws[new.request_id][0], text

    scores = judge.judge(responses())
    attempts: dict[str, Attempt] = {}
    for (new, text), score in zip(finished, scores, strict=True):
        prompt, seed, index = draws[new.request_id]
        attempts[new.request_id] = Attempt(
            set=held_out.name,
            prompt_id=prompt.id,
            seed=seed,
            index=index,
            text=text,
            score=score,
            num_tokens=len(new.token_ids),
            finish_reason=new.finish_reason,
        )
    return [attempts[id] for id in draws]


def _draws(prompts: Sequence[Prompt], cfg: Config) -> Iterator[Draw]:
    for prompt in prompts:
        if cfg.eval.greedy:
            yield prompt, None, 0
        for seed in range(cfg.eval.num_seeds):
            for index in range(cfg.eval.num_samples):
                yield prompt, seed, index


def _id(name: str, draw: Draw) -> str:
    prompt, seed, index = draw
    return f"eval/{name}/{prompt.id}/{'greedy' if seed is None else f'{seed}/{index}'}"


def _request(id: str, draw: Draw, cfg: Config) -> Request:
    prompt, seed, index = draw
    return Request(
        id=id,
        purpose="eval",
        context=prompt.token_ids,
        max_tokens=cfg.rollout.max_response_tokens,
        temperature=0.0 if seed is None else cfg.eval.temperature,
        top_p=1.0 if seed is None else cfg.rollout.top_p,
        seed=counter_seed(cfg.seed, "eval", prompt.id, seed or 0, index),
    )


def attempt_sums(attempts: Sequence[Attempt], cfg: Config) -> Sums:
    """One replica's share of the metrics `eval/<set>/...`; no replica holds a part of a problem."""
    sums: Sums = {}
    for name in cfg.eval.sets:
        of_set = [attempt for attempt in attempts if attempt.set == name]
        sums |= {f"eval/{name}/{key}": pair for key, pair in _set_sums(of_set, cfg).items()}
    return sums


def _set_sums(attempts: Sequence[Attempt], cfg: Config) -> Sums:
    if not attempts:
        return {}
    num_failed = sum(attempt.score.failure is not None for attempt in attempts)
    num_cut = sum(attempt.finish_reason == "length" for attempt in attempts)
    sums: Sums = {
        "response_tokens_mean": (sum(a.num_tokens for a in attempts), len(attempts)),
        "truncated_rate": (num_cut, len(attempts)),
        "failure_rate": (num_failed, len(attempts)),
    }
    compared = [
        score
        for score in (attempt.score for attempt in attempts)
        if score.failure is None and score.second_opinion is not None
    ]
    if compared:
        agreed = sum(score.second_opinion == score.correct for score in compared)
        sums["agreement"] = (agreed, len(compared))
        sums["second_opinion_rate"] = (
            sum(s.second_opinion is True for s in compared),
            len(compared),
        )
    for name, chances in all_chances(attempts, cfg).items():
        if chances:
            sums[name] = (sum(chances.values()), len(chances))
    return sums


Chances = dict[tuple[str, int], float]
"""(problem, seed) -> estimated chance of a right response"""


def all_chances(attempts: Sequence[Attempt], cfg: Config) -> dict[str, Chances]:
    """`greedy`, where there are such responses, and `pass_at_<k>` of the others."""
    greedy = [attempt for attempt in attempts if attempt.seed is None]
    sampled = [attempt for attempt in attempts if attempt.seed is not None]
    found = {"greedy": pass_at(1, greedy)} if cfg.eval.greedy else {}
    if cfg.eval.num_samples:
        found |= {f"pass_at_{k}": pass_at(k, sampled) for k in cfg.eval.pass_at}
    return found


def pass_at(k: int, attempts: Iterable[Attempt]) -> Chances:
    """Of each problem and seed that has at least k verdicts."""
    verdicts: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for attempt in attempts:
        if attempt.score.failure is None:
            verdicts[attempt.prompt_id, attempt.seed or 0].append(attempt.score.correct)
    return {key: chance_at(k, len(v), sum(v)) for key, v in verdicts.items() if len(v) >= k}


def chance_at(k: int, num_responses: int, num_correct: int) -> float:
    """That k of the responses, drawn without replacement, hold a right one.

    >>> chance_at(2, 4, 1), chance_at(2, 4, 3)
    (0.5, 1.0)
    """
    return 1 - comb(num_responses - num_correct, k) / comb(num_responses, k)

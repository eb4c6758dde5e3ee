"""How good is the policy on problems that it was not trained on?   prompts -> attempts -> pass@k

pass@k is the chance that one of k responses to a problem is right, estimated without bias from n
responses of which c are right: 1 - C(n - c, k) / C(n, k)  (Chen et al. 2021, arXiv 2107.03374).

A response whose reward failed has no verdict: it is counted in `failure_rate` and left out of n. A
problem with fewer than k verdicts is left out of pass@k; where that is every problem, there is no
such metric.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

from megatron_srpo.config import Config
from megatron_srpo.metrics import Sums
from megatron_srpo.protocols import Generator, Judge, Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import Completion, Prompt, Request, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A scored response to a held-out problem."""

    prompt_id: str
    index: int
    """Tells apart the `eval.num_samples` responses to a problem."""
    text: str
    score: Score
    num_tokens: int
    """A sampled end-of-sequence token included."""
    finish_reason: Literal["stop", "length"]


def evaluate(
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    tokenizer: Tokenizer,
    judge: Judge,
    cfg: Config,
) -> list[Attempt]:
    """`eval.num_samples` responses per prompt, in the prompts' order.

    Seeds depend on neither step nor neighbours, so evaluations of two policies are paired. The
    nucleus, if any, is the rollouts' (`rollout.top_p`).
    """
    draws = {f"eval/{p.id}/{i}": (p, i) for p in prompts for i in range(cfg.eval.num_samples)}
    requests = [
        Request(
            id=id,
            purpose="eval",
            context=prompt.token_ids,
            max_tokens=cfg.rollout.max_response_tokens,
            temperature=cfg.eval.temperature,
            top_p=cfg.rollout.top_p,
            seed=counter_seed(cfg.seed, "eval", prompt.id, index),
        )
        for id, (prompt, index) in draws.items()
    ]
    finished: list[tuple[Completion, str]] = []

    def responses() -> Iterator[tuple[Prompt, str]]:
        for completion in generator.generate(requests):
            prompt, _ = draws[completion.request_id]
            finished.append((completion, "".join(tokenizer.pieces(completion.token_ids))))
            yield prompt, finished[-1][1]

    attempts: dict[str, Attempt] = {}
    scores = judge.judge(responses())
    for (completion, text), score in zip(finished, scores, strict=True):
        prompt, index = draws[completion.request_id]
        attempts[completion.request_id] = Attempt(
            prompt_id=prompt.id,
            index=index,
            text=text,
            score=score,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
        )
    return [attempts[id] for id in draws]


def attempt_sums(attempts: Sequence[Attempt], cfg: Config) -> Sums:
    """One replica's share of the metrics `eval/<set>/...`; no replica holds a part of a problem."""
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
        score.second_opinion == score.correct
        for score in (attempt.score for attempt in attempts)
        if score.failure is None and score.second_opinion is not None
    ]
    if compared:
        sums["agreement"] = (sum(compared), len(compared))
    for k in cfg.eval.pass_at:
        if chances := pass_at(k, attempts):
            sums[f"pass_at_{k}"] = (sum(chances), len(chances))
    return {f"eval/{cfg.data.eval.stem}/{name}": pair for name, pair in sums.items()}


def pass_at(k: int, attempts: Sequence[Attempt]) -> list[float]:
    """pass@k of each problem that has at least k verdicts."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for attempt in attempts:
        if attempt.score.failure is None:
            verdicts[attempt.prompt_id].append(attempt.score.correct)
    return [chance_at(k, len(v), sum(v)) for v in verdicts.values() if len(v) >= k]


def chance_at(k: int, num_responses: int, num_correct: int) -> float:
    """That k of the responses, drawn without replacement, hold a right one.

    >>> chance_at(2, 4, 1), chance_at(2, 4, 3)
    (0.5, 1.0)
    """
    return 1 - comb(num_responses - num_correct, k) / comb(num_responses, k)

"""Where to go back to: for each failed rollout (seed), the first thought that is not kept.

    seeds -> resets

A new rule is one class here: `choose` is all it needs (`protocols.ResetRule`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_srpo.config import Config
from megatron_srpo.localize import PARSERS, localization_context
from megatron_srpo.protocols import Generator, ResetRule, Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.thoughts import body
from megatron_srpo.types import Completion, Request, Reset, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomReset:
    """RRPO: any thought of the seed, uniformly; the first one restarts from the prompt."""

    run_seed: int

    def choose(self, seeds: Sequence[Rollout], generator: Generator, step: int) -> list[Reset]:
        return [
            Reset(
                seed_id=seed.id,
                thought=random.Random(
                    counter_seed(self.run_seed, step, seed.prompt.id, "reset", 0)
                ).randrange(len(seed.thoughts)),
                cause="random",
            )
            for seed in seeds
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfReset:
    """SRPO: the thought that the policy itself names. An answer that names none restarts."""

    tokenizer: Tokenizer
    cfg: Config

    def choose(self, seeds: Sequence[Rollout], generator: Generator, step: int) -> list[Reset]:
        requests = {seed.id: self._question(seed, step) for seed in seeds}
        longest = self.cfg.rollout.max_model_len - self.cfg.localize.max_tokens
        asked = [request for request in requests.values() if len(request.context) <= longest]
        answers = {answer.request_id: answer for answer in generator.generate(asked)}
        return [self._read(seed, answers.get(requests[seed.id].id)) for seed in seeds]

    def _question(self, seed: Rollout, step: int) -> Request:
        return Request(
            id=f"{seed.id}/localize",
            purpose="localize",
            context=localization_context(
                seed, self.tokenizer, self.cfg.localize, self.cfg.thoughts.delimiter
            ),
            max_tokens=self.cfg.localize.max_tokens,
            temperature=self.cfg.localize.temperature,
            seed=counter_seed(self.cfg.seed, step, seed.prompt.id, "localize", 0),
        )

    def _read(self, seed: Rollout, answer: Completion | None) -> Reset:
        if answer is None:
            return Reset(seed_id=seed.id, thought=0, cause="too_long")
        text = "".join(self.tokenizer.pieces(answer.token_ids))
        verdict = PARSERS[self.cfg.localize.parser](text, len(seed.thoughts))
        return Reset(
            seed_id=seed.id,
            thought=verdict if isinstance(verdict, int) else 0,
            cause="named" if isinstance(verdict, int) else verdict,
            answer=text,
            num_tokens=len(answer.token_ids),
            num_cached_tokens=answer.num_cached_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleReset:
    """The first wrong thought, from the task's own solution: what perfect localization would do."""

    delimiter: str

    def choose(self, seeds: Sequence[Rollout], generator: Generator, step: int) -> list[Reset]:
        resets: list[Reset] = []
        for seed in seeds:
            thought = first_wrong_thought(seed, self.delimiter)
            assert thought is not None, f"{seed.prompt.id}: the oracle needs a `solution`"
            resets.append(Reset(seed_id=seed.id, thought=thought, cause="oracle"))
        return resets


def first_wrong_thought(rollout: Rollout, delimiter: str) -> int | None:
    """Index of the first thought that differs from the solution's; the last if it stops short.

    None where the task does not know the solution.
    """
    solution = rollout.prompt.solution
    if not solution:
        return None
    for index, thought in enumerate(rollout.thoughts):
        if index >= len(solution) or body(thought, delimiter) != solution[index].strip():
            return index
    return len(rollout.thoughts) - 1


def reset_rule(cfg: Config, tokenizer: Tokenizer) -> ResetRule:
    """The rule that `algorithm.method` names. GRPO resets nothing: its rule is never asked."""
    if cfg.algorithm.method == "srpo":
        return SelfReset(tokenizer=tokenizer, cfg=cfg)
    if cfg.algorithm.method == "oracle":
        return OracleReset(delimiter=cfg.thoughts.delimiter)
    return RandomReset(run_seed=cfg.seed)

"""One will per replica: what its leader decides, all its ranks do.

The ranks of a rollout engine must send it the same requests, or they wait for each other for ever.
A reward may be a service or a clock, a rule may read a file: their answers are the leader's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.protocols import Generator, ResetRule, Reward
from megatron_srpo.types import AlarmError, Prompt, Reset, Rollout, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderReward:
    """Implements `protocols.Reward`; only the leader computes it."""

    reward: Reward
    mesh: Mesh

    def __call__(self, prompt: Prompt, response: str) -> Score:
        """Raises `AlarmError` on every rank of the replica if the leader's reward raises."""
        score: Score | None = None
        try:
            if self.mesh.is_leader:
                score = self.reward(prompt, response)
        finally:  # whatever was raised: the other ranks wait for a word
            score, failure = self.mesh.share((score, _what_is_raised(score)))
            if failure is not None:
                raise AlarmError(f"the reward of prompt {prompt.id!r} raised {failure}")
        assert score is not None, "the leader said neither a score nor what was wrong"
        return score


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRule:
    """Implements `protocols.ResetRule`; all ranks ask it, for it may drive their engine."""

    rule: ResetRule
    mesh: Mesh

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        """Raises `AlarmError` on every rank of the replica if the leader's rule raises."""
        resets: list[Reset] | None = None
        try:
            resets = self.rule.choose(seeds, generator)
        finally:
            resets, failure = self.mesh.share((resets, _what_is_raised(resets)))
            if failure is not None:
                raise AlarmError(f"the reset rule raised {failure}")
        assert resets is not None, "the leader said neither resets nor what was wrong"
        return resets


def _what_is_raised(answer: object | None) -> str | None:
    """In words, where there is no answer: an exception need not survive the way to another rank."""
    error = sys.exception()
    return None if answer is not None or error is None else f"{type(error).__name__}: {error}"

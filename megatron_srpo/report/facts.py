"""What do the rollouts say that the metrics do not?   groups -> depths of resets, lengths

From all rollouts of a run, whatever part of them a page can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srpo.types import Group, Rollout

NUM_BINS = 10
"""Of depth: a reset to thought i of n lies at i / n of the chain."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Depths:
    """Counts by depth, each [NUM_BINS]."""

    resets: np.ndarray
    suffixes: np.ndarray
    """That have a verdict."""
    corrected: np.ndarray
    """Suffixes that are right."""

    @classmethod
    def none(cls) -> Depths:
        """Of no rollouts."""
        zero = np.zeros(NUM_BINS, dtype=np.int64)
        return cls(resets=zero, suffixes=zero, corrected=zero)

    def __add__(self, other: Depths) -> Depths:
        return Depths(
            resets=self.resets + other.resets,
            suffixes=self.suffixes + other.suffixes,
            corrected=self.corrected + other.corrected,
        )


def depths(groups: Sequence[Group]) -> Depths:
    """Of all resets that made suffixes in groups that are trained."""
    rollouts = {rollout.id: rollout for group in groups for rollout in group.rollouts}
    counts = np.zeros((3, NUM_BINS), dtype=np.int64)
    for group in groups:
        for reset in group.resets if group.use == "train" else ():
            seed = rollouts.get(reset.seed_id)
            if seed is None or reset.thought is None:
                continue
            place = reset.thought * NUM_BINS // max(len(seed.thoughts), reset.thought + 1)
            grown = [r for r in group.rollouts if r.seed_id == seed.id and not r.score.failure]
            counts[:, place] += (1, len(grown), sum(rollout.score.correct for rollout in grown))
    return Depths(resets=counts[0], suffixes=counts[1], corrected=counts[2])


def lengths(groups: Sequence[Group]) -> dict[str, float]:
    """Tokens of a response, by verdict: metrics of a step."""
    trained = [r for group in groups if group.use == "train" for r in group.rollouts]
    by_kind: dict[str, list[Rollout]] = {
        "response/tokens_pass": [r for r in trained if r.score.correct and not r.score.failure],
        "response/tokens_fail": [r for r in trained if not r.score.correct],
        "response/tokens_mean": trained,
    }
    means = {
        name: float(np.mean([len(rollout.token_ids) for rollout in rollouts]))
        for name, rollouts in by_kind.items()
        if rollouts
    }
    longest = max((len(rollout.token_ids) for rollout in trained), default=None)
    return means if longest is None else means | {"response/tokens_max": float(longest)}

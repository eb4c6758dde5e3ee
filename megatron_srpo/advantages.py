"""Whose fault was it?   groups -> credit per token

A new rule is one class here: `assign` sees all groups of a step (`protocols.CreditRule`).
Legend: G rollouts of a group, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srpo.types import Floats, Group, Rollout


@dataclass(frozen=True, slots=True)
class GroupNormalized:
    """The paper's credit: (r - mean) / population std in a group, on the tokens it sampled itself.

    A copied prefix has weight 0. Weights are 1/length, so that the loss is a mean over sequences
    of token means (paper section 3; released srpo_loss). A reward that could not be computed is
    no reward of 0: its rollout is left out of the statistics and of the loss.
    """

    def assign(self, groups: Sequence[Group]) -> list[list[tuple[Floats, Floats]]]:
        return [
            [
                _on_own_tokens(rollout, advantage)
                for rollout, advantage in zip(
                    group.rollouts, _normalized(group.rollouts), strict=True
                )
            ]
            for group in groups
        ]


def _normalized(rollouts: Sequence[Rollout]) -> Floats:
    """[G] advantages; exactly 0 where all rewards agree, NaN-free by construction."""
    scored = np.array([rollout.score.failure is None for rollout in rollouts])
    rewards = np.array([rollout.score.value for rollout in rollouts], dtype=np.float64)
    advantages = np.zeros(len(rollouts), dtype=np.float32)
    if scored.any() and np.ptp(rewards[scored]) > 0:
        centred = rewards[scored] - rewards[scored].mean()
        advantages[scored] = centred / rewards[scored].std()
    return advantages


def _on_own_tokens(rollout: Rollout, advantage: float) -> tuple[Floats, Floats]:
    """(loss_weight, advantage), each [T]."""
    num_own = len(rollout.token_ids) - rollout.num_copied
    loss_weight = np.zeros(len(rollout.token_ids), dtype=np.float32)
    if rollout.score.failure is None:
        loss_weight[rollout.num_copied :] = 1.0 / num_own
    advantages = np.zeros(len(rollout.token_ids), dtype=np.float32)
    advantages[rollout.num_copied :] = advantage
    return loss_weight, advantages

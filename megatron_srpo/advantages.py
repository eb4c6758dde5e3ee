"""Whose fault was it?   groups -> credit per token

A new rule is one class, here or in a file of yours: built with (cfg), and `assign` sees all groups
of a step (`protocols.CreditRule`). Legend: G rollouts of a group, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.protocols import CreditRule
from megatron_srpo.types import AlarmError, Floats, Group, Rollout


@dataclass(frozen=True, slots=True)
class GroupNormalized:
    """(r - baseline) / std in a group, on the tokens that a rollout sampled itself.

    A copied prefix has weight 0. The default, population std and a mean over sequences of token
    means, is the paper's (section 3; released srpo_loss); `credit.*` has the other conventions:
    sample std and token mean are verl's GRPO, no std is Dr. GRPO (2503.20783), leave-one-out is
    RLOO (2402.14740). A reward that could not be computed is no reward of 0: its rollout is left
    out of the statistics and of the loss.
    """

    cfg: Config

    def assign(self, groups: Sequence[Group]) -> list[list[tuple[Floats, Floats]]]:
        return [
            [
                self._on_own_tokens(rollout, advantage)
                for rollout, advantage in zip(group.rollouts, self._advantages(group), strict=True)
            ]
            for group in groups
        ]

    def _advantages(self, group: Group) -> Floats:
        """[G]; exactly 0 where all rewards agree, NaN-free by construction."""
        scored = np.array([rollout.score.failure is None for rollout in group.rollouts])
        rewards = np.array([r.score.value for r in group.rollouts], dtype=np.float64)[scored]
        advantages = np.zeros(len(group.rollouts), dtype=np.float32)
        if group.has_signal:
            centred = rewards - rewards.mean()
            if self.cfg.credit.baseline == "leave_one_out":
                centred *= len(rewards) / (len(rewards) - 1)
            advantages[scored] = centred / self._std(rewards)
        return advantages

    def _std(self, rewards: np.ndarray) -> float:
        if self.cfg.credit.std == "none":
            return 1.0
        return float(rewards.std(ddof=1 if self.cfg.credit.std == "sample" else 0))

    def _on_own_tokens(self, rollout: Rollout, advantage: float) -> tuple[Floats, Floats]:
        """(loss_weight, advantage), each [T]."""
        num_own = len(rollout.token_ids) - rollout.num_copied
        loss_weight = np.zeros(len(rollout.token_ids), dtype=np.float32)
        if rollout.score.failure is None:
            is_mean = self.cfg.credit.aggregation == "sequence_mean"
            loss_weight[rollout.num_copied :] = 1.0 / num_own if is_mean else 1.0
        advantages = np.zeros(len(rollout.token_ids), dtype=np.float32)
        advantages[rollout.num_copied :] = advantage
        return loss_weight, advantages


CREDITS: dict[str, Callable[[Config], CreditRule]] = {"group": GroupNormalized}


def credited(groups: Sequence[Group], rule: CreditRule) -> Iterator[tuple[Rollout, Floats, Floats]]:
    """(rollout, loss_weight [T], advantage [T]) of every rollout that is trained.

    Raises `AlarmError` if the rule's answer does not fit the rollouts, is not finite, or weighs
    anything by less than nothing.
    """
    trained = [group for group in groups if group.use == "train"]
    answer = [
        [[np.asarray(part, np.float32) for part in credit] for credit in credits]
        for credits in rule.assign(trained)
    ]
    wanted = [[[rollout.token_ids.shape] * 2 for rollout in group.rollouts] for group in trained]
    if [[[part.shape for part in credit] for credit in credits] for credits in answer] != wanted:
        raise AlarmError(
            "the credit rule must give (loss_weight, advantage), each as long as the response, "
            "for every rollout of every group"
        )
    for group, credits in zip(trained, answer, strict=True):
        for rollout, (loss_weight, advantage) in zip(group.rollouts, credits, strict=True):
            if not (np.isfinite(loss_weight).all() and np.isfinite(advantage).all()):
                raise AlarmError(f"the credit rule's answer for {rollout.id} is not finite")
            if (loss_weight < 0).any():
                raise AlarmError(f"the credit rule gave {rollout.id} a negative loss_weight")
            yield rollout, loss_weight, advantage

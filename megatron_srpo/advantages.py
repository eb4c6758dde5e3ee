"""Whose fault was it?   groups -> credit per token

A new rule is one class, here or in a file of yours: built with (cfg), and `assign` sees all groups
of a step (`protocols.CreditRule`). Legend: G rollouts of a group, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.config_method import CreditConfig
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
        credit = self.cfg.credit
        return [_on_own_tokens(group, advantages_of(group, credit), credit) for group in groups]


@dataclass(frozen=True, slots=True)
class Pooled:
    """The same, with one baseline and one std for all rollouts of a prompt, whatever they left."""

    cfg: Config

    def assign(self, groups: Sequence[Group]) -> list[list[tuple[Floats, Floats]]]:
        credit = self.cfg.credit
        pooled = _by_rollout(groups, lambda pool: advantages_of(pool, credit))
        return [
            _on_own_tokens(group, [pooled[r.id] for r in group.rollouts], credit)
            for group in groups
        ]


@dataclass(frozen=True, slots=True)
class Chain:
    """Pooled credit, and what the copied prefix z deserves: `prefix_weight` r / std, no baseline.

    By the product rule grad V(x) = sum_z pi(z) [V(z) grad log pi(z) + grad V(z)]: suffixes estimate
    the second term, and masking the prefix drops the first. Parallel to the gradient where one
    chain of thoughts leads to the answer; where many do, prefixes that fail often are favoured,
    because they are reset to often (docs/theory.md). For rewards that are 0 where nothing is right.

    With `aggregation=sequence_mean` all T tokens of a response weigh 1/T, whoever sampled them.
    """

    cfg: Config

    def assign(self, groups: Sequence[Group]) -> list[list[tuple[Floats, Floats]]]:
        credit = self.cfg.credit
        own = _by_rollout(groups, lambda pool: advantages_of(pool, credit))
        copied = _by_rollout(groups, lambda pool: credit.prefix_weight * scaled(pool, credit))
        return [
            [_on_all_tokens(r, own[r.id], copied[r.id], credit) for r in group.rollouts]
            for group in groups
        ]


def advantages_of(group: Group, cfg: CreditConfig) -> Floats:
    """[G]; exactly 0 where all rewards agree, NaN-free by construction."""
    rewards, is_scored = _rewards(group)
    mean = rewards[is_scored].mean() if is_scored.any() else 0.0
    num = is_scored.sum()
    baseline = mean / 2 if cfg.baseline == "half" else mean
    centred = (rewards - baseline) * is_scored
    if cfg.baseline == "leave_one_out" and num > 1:
        centred *= num / (num - 1)
    return (centred / _std(group, cfg)).astype(np.float32)


def scaled(group: Group, cfg: CreditConfig) -> Floats:
    """[G] rewards in units of their spread; 0 where all agree, or a reward was not computed."""
    return (_rewards(group)[0] / _std(group, cfg)).astype(np.float32)


def _rewards(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """([G] float64, 0 where it could not be computed; [G] whether it could)"""
    is_scored = np.array([rollout.score.failure is None for rollout in group.rollouts])
    values = np.array([rollout.score.value for rollout in group.rollouts], dtype=np.float64)
    return np.where(is_scored, values, 0.0), is_scored


def _std(group: Group, cfg: CreditConfig) -> float:
    """What differences of rewards are divided by; infinity where there are none."""
    if not group.has_signal:
        return np.inf
    if cfg.std == "none":
        return 1.0
    rewards, is_scored = _rewards(group)
    return float(rewards[is_scored].std(ddof=1 if cfg.std == "sample" else 0))


def _by_rollout(groups: Sequence[Group], values: Callable[[Group], Floats]) -> dict[str, float]:
    """Rollout id -> its value, all of a prompt's rollouts taken for one group."""
    pools: dict[str, list[Rollout]] = {}
    for group in groups:
        pools.setdefault(group.prompt.id, []).extend(group.rollouts)
    return {
        rollout.id: float(value)
        for pool in pools.values()
        for rollout, value in zip(
            pool, values(Group(prompt=pool[0].prompt, rollouts=tuple(pool))), strict=True
        )
    }


def _on_own_tokens(
    group: Group, advantages: Sequence[float] | Floats, cfg: CreditConfig
) -> list[tuple[Floats, Floats]]:
    """(loss_weight, advantage), each [T], of each rollout; 0 on what it copied."""
    credits: list[tuple[Floats, Floats]] = []
    for rollout, advantage in zip(group.rollouts, advantages, strict=True):
        on_tokens = np.full(len(rollout.token_ids), advantage, dtype=np.float32)
        on_tokens[: rollout.num_copied] = 0.0
        credits.append((_weights(rollout, first=rollout.num_copied, cfg=cfg), on_tokens))
    return credits


def _on_all_tokens(
    rollout: Rollout, own: float, copied: float, cfg: CreditConfig
) -> tuple[Floats, Floats]:
    advantage = np.full(len(rollout.token_ids), own, dtype=np.float32)
    advantage[: rollout.num_copied] = copied
    return _weights(rollout, first=0, cfg=cfg), advantage


def _weights(rollout: Rollout, *, first: int, cfg: CreditConfig) -> Floats:
    """[T] loss weights of the tokens from `first` on; 0 on all without a verdict."""
    num = len(rollout.token_ids)
    loss_weight = np.zeros(num, dtype=np.float32)
    if rollout.score.failure is None:
        loss_weight[first:] = 1.0 / (num - first) if cfg.aggregation == "sequence_mean" else 1.0
    return loss_weight


CREDITS: dict[str, Callable[[Config], CreditRule]] = {
    "group": GroupNormalized,
    "pooled": Pooled,
    "chain": Chain,
}


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

"""What did a step's rollouts look like?   groups -> metrics

Every metric is a quotient of two sums, so replicas add their sums up before they divide. Names
are stable: dashboards read them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_srpo.resets import first_wrong_thought
from megatron_srpo.types import Group, Rollout

Sums = dict[str, tuple[float, float]]
"""name -> (numerator, denominator)"""


class Add(Protocol):
    """Adds to a metric's two sums."""

    def __call__(self, name: str, numerator: float, denominator: float = 1.0) -> None: ...


def rollout_sums(groups: Sequence[Group], delimiter: str) -> Sums:
    """One replica's share of all metrics of a step."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, numerator: float, denominator: float = 1.0) -> None:
        sums[name][0] += numerator
        sums[name][1] += denominator

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        _add_rollout(rollout, add)
    for group in groups:
        scored = [r.score.value for r in group.rollouts if r.score.failure is None]
        add("group/zero_signal_rate", len(set(scored)) < 2)
    _add_resets(groups, {rollout.id: rollout for rollout in rollouts}, delimiter, add)
    return {name: (numerator, denominator) for name, (numerator, denominator) in sums.items()}


def _add_rollout(rollout: Rollout, add: Add) -> None:
    score, num_own = rollout.score, len(rollout.token_ids) - rollout.num_copied
    add("tokens/suffix" if rollout.stage == "suffix" else "tokens/base", num_own, 0)
    add("tokens/prefix_cached", rollout.num_cached_tokens, 0)
    if rollout.stage == "suffix":
        add("reset/prefix_cached_tokens", rollout.num_cached_tokens, 0)
    add("thought/num_mean", len(rollout.thoughts))
    for thought in rollout.thoughts:
        add("thought/cut_rate", thought.was_cut)
    add("rollout/truncated_rate", rollout.finish_reason == "length")
    add("reward/failure_rate", score.failure is not None)
    if score.failure is not None:
        return
    add("reward/mean", score.value)
    if rollout.stage != "extra":
        add(f"reward/{rollout.stage}_mean", score.value)
        add(f"pass_rate/{rollout.stage}", score.correct)


def _add_resets(
    groups: Sequence[Group], by_id: dict[str, Rollout], delimiter: str, add: Add
) -> None:
    prompts = {group.prompt.id for group in groups}
    resets = [group.reset for group in groups if group.reset is not None]
    add("reset/seed_found_rate", len(resets), len(prompts))
    for group in groups:
        reset = group.reset
        if reset is None:
            continue
        seed = by_id[reset.seed_id]
        add("tokens/localize", reset.num_tokens, 0)
        add("tokens/prefix_cached", reset.num_cached_tokens, 0)
        add("reset/thought_index_mean", reset.thought)
        add("reset/depth_frac_mean", reset.thought / len(seed.thoughts))
        add("reset/empty_prefix_rate", reset.thought == 0)
        add("reset/moved_rate", reset.moved_from is not None)
        add("localize/parse_failed_rate", reset.cause == "unparsed")
        add("localize/no_error_rate", reset.cause == "no_error")
        add("localize/too_long_rate", reset.cause == "too_long")
        truth = first_wrong_thought(seed, delimiter)
        if truth is None:
            continue
        if reset.cause in ("named", "oracle"):  # a random draw or a restart localizes nothing
            chosen = reset.thought if reset.moved_from is None else reset.moved_from
            add("localize/exact_rate", chosen == truth)
            add("localize/clean_rate", chosen <= truth)
        is_clean = reset.thought <= truth
        for rollout in group.rollouts:
            if rollout.stage == "suffix":
                kind = "clean" if is_clean else "erroneous"
                add(f"reset/{kind}_corrected_rate", rollout.score.correct)


def combine(shares: Iterable[Sums]) -> dict[str, float]:
    """All replicas' sums -> metrics. A denominator of 0 makes a plain sum (token counts)."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for share in shares:
        for name, (numerator, denominator) in share.items():
            total[name][0] += numerator
            total[name][1] += denominator
    return {
        name: numerator / denominator if denominator else numerator
        for name, (numerator, denominator) in sorted(total.items())
    }

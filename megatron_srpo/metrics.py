"""What did a step's rollouts look like?   groups -> metrics

Every metric is a quotient of two sums, so replicas add their sums up before they divide. Names
are stable: dashboards read them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_srpo.config import Config
from megatron_srpo.payoff import payoff_sums
from megatron_srpo.resets import first_wrong_thought
from megatron_srpo.types import Group, Reset, Rollout

Sums = dict[str, tuple[float, float]]
"""name -> (numerator, denominator)"""
GENERATED = ("tokens/base", "tokens/seed", "tokens/replaced", "tokens/localize", "tokens/suffix")
"""What an engine sampled in a step, by what for: a comparison of cost counts them all."""


class Add(Protocol):
    """Adds to a metric's two sums."""

    def __call__(self, name: str, numerator: float, denominator: float = 1.0) -> None: ...


def rollout_sums(groups: Sequence[Group], cfg: Config) -> Sums:
    """One replica's share of all metrics of a step."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, numerator: float, denominator: float = 1.0) -> None:
        sums[name][0] += numerator
        sums[name][1] += denominator

    trained = [group for group in groups if group.use == "train"]
    for group in groups:
        _add_tokens(group, add)
    for group in trained:
        add("group/zero_signal_rate", not group.has_signal)
        for rollout in group.rollouts:
            _add_rollout(rollout, add)
    by_id = {rollout.id: rollout for group in groups for rollout in group.rollouts}
    prompts = {group.prompt.id for group in groups}
    replaced = {group.prompt.id for group in groups if group.use == "replaced"}
    add("group/num_mean", len(trained), len(prompts))
    add("group/redrawn_rate", len(replaced), len(prompts))
    if cfg.algorithm.num_seeds:
        reset = [by_id[reset.seed_id] for group in trained for reset in group.resets]
        found = sum(rollout.stage == "base" for rollout in reset)  # not those of later rounds
        add("reset/seed_found_rate", found, len(prompts) * cfg.algorithm.num_seeds)
        for name, (numerator, denominator) in payoff_sums(groups, cfg.credit).items():
            add(name, numerator, denominator)
    for group in trained:
        for reset in group.resets:
            seed = by_id[reset.seed_id]
            _add_reset(reset, seed, add)
            truth = first_wrong_thought(seed, cfg.thoughts.delimiter)
            if truth is not None:
                _add_verdict(reset, truth, group, add)
    return {name: (numerator, denominator) for name, (numerator, denominator) in sums.items()}


def _add_tokens(group: Group, add: Add) -> None:
    """Every token that was generated or reused, by what for: comparisons count them all."""
    for rollout in group.rollouts:
        kind = "suffix" if rollout.stage == "suffix" else "base"
        if group.use != "train":
            kind = {"seeds": "seed", "replaced": "replaced"}[group.use]
        add(f"tokens/{kind}", len(rollout.token_ids) - rollout.num_copied, 0)
        add("tokens/prefix_cached", rollout.num_cached_tokens, 0)
        if rollout.stage == "suffix":
            add("reset/prefix_cached_tokens", rollout.num_cached_tokens, 0)
    for reset in group.resets:
        add("tokens/localize", reset.num_tokens, 0)
        add("tokens/prefix_cached", reset.num_cached_tokens, 0)


def _add_rollout(rollout: Rollout, add: Add) -> None:
    score = rollout.score
    add("thought/num_mean", len(rollout.thoughts))
    for thought in rollout.thoughts:
        add("thought/cut_rate", thought.was_cut)
    add("rollout/truncated_rate", rollout.finish_reason == "length")
    add("reward/failure_rate", score.failure is not None)
    if score.failure is not None:
        return
    add("reward/mean", score.value)
    if score.second_opinion is not None:
        add("reward/agreement", score.second_opinion == score.correct)
    if rollout.stage != "extra":
        add(f"reward/{rollout.stage}_mean", score.value)
        add(f"pass_rate/{rollout.stage}", score.correct)


def _add_reset(reset: Reset, seed: Rollout, add: Add) -> None:
    add("localize/parse_failed_rate", reset.cause == "unparsed")
    add("localize/no_error_rate", reset.cause == "no_error")
    add("localize/too_long_rate", reset.cause == "too_long")
    if reset.cause == "nearer":
        return
    add("reset/skipped_rate", reset.thought is None)
    if reset.thought is None:
        return
    add("reset/thought_index_mean", reset.thought)
    add("reset/depth_frac_mean", reset.thought / len(seed.thoughts))
    add("reset/empty_prefix_rate", reset.thought == 0)
    add("reset/moved_rate", reset.moved_from is not None)
    add("reset/moved_by_mean", _chosen(reset) - reset.thought)


def _chosen(reset: Reset) -> int:
    """The thought that the rule chose, whatever became of it."""
    chosen = reset.thought if reset.moved_from is None else reset.moved_from
    assert chosen is not None, f"{reset.seed_id} was not reset"
    return chosen


def _add_verdict(reset: Reset, truth: int, group: Group, add: Add) -> None:
    """Against the first wrong thought, where the task knows it."""
    if reset.thought is None:
        return
    if reset.cause in ("named", "oracle", "dial"):  # a random draw or a restart localizes nothing
        add("localize/exact_rate", _chosen(reset) == truth)
        add("localize/clean_rate", _chosen(reset) <= truth)
    kind = "clean" if reset.thought <= truth else "erroneous"
    for rollout in group.rollouts:
        if rollout.seed_id == reset.seed_id and rollout.score.failure is None:
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

"""Every metric of a hand-made step, and replicas that add up to the whole."""

from __future__ import annotations

import pytest

from megatron_srpo.metrics import combine, rollout_sums
from megatron_srpo.types import Group, Reset, Rollout
from tests.unit.builders import config, group, prompt, rollout

KNOWN = prompt(id="k", solution=("5", "8", "1"))


def step() -> list[Group]:
    """One prompt with a reset to thought 1 of 3, one whose resets went to fresh rollouts."""
    seed = rollout("5\n6\n2", id="k1", of=KNOWN, num_cached_tokens=3)
    base = group(rollout("5\n1", id="k0", of=KNOWN, reward=1.0), seed)
    reset = Reset(
        seed_id="k1", thought=1, cause="named", num_tokens=10, num_cached_tokens=20, moved_from=2
    )
    suffix = group(
        rollout("5\n1", id="s0", of=KNOWN, num_copied=2, seed_id="k1", reward=1.0),
        rollout("5\n9999", id="s1", of=KNOWN, num_copied=2, seed_id="k1", finish_reason="length"),
        resets=(reset,),
    )
    other = prompt(id="o")
    fresh = group(
        rollout("1", id="o0", of=other, reward=1.0),
        rollout("1", id="o1", of=other, reward=1.0),
        rollout("4", id="o2", of=other, reward=1.0, stage="extra"),
    )
    return [base, suffix, fresh]


def test_every_metric_of_a_step_is_the_one_counted_by_hand():
    metrics = combine([rollout_sums(step(), config())])
    assert metrics == pytest.approx(
        {
            # Own tokens, ends of sequence included: 4 + 6, 2 + 2 + 2; and 2 + 5.
            "tokens/base": 16,
            "tokens/suffix": 7,
            "tokens/localize": 10,
            "tokens/prefix_cached": 23,
            # Thoughts: 2 3 2 2 1 1 1. One of 12 was cut: 9999 holds four tokens and goes on.
            "thought/num_mean": 12 / 7,
            "thought/cut_rate": 0 / 12,
            "rollout/truncated_rate": 1 / 7,
            "reward/failure_rate": 0,
            "reward/mean": 5 / 7,
            "reward/base_mean": 3 / 4,
            "reward/suffix_mean": 1 / 2,
            "pass_rate/base": 3 / 4,
            "pass_rate/suffix": 1 / 2,
            "group/zero_signal_rate": 1 / 3,
            "reset/seed_found_rate": 1 / 2,
            "reset/thought_index_mean": 1,
            "reset/depth_frac_mean": 1 / 3,
            "reset/empty_prefix_rate": 0,
            "reset/moved_rate": 1,
            "reset/moved_by_mean": 1,
            "reset/skipped_rate": 0,
            "group/num_mean": 3 / 2,
            "group/redrawn_rate": 0,
            "localize/parse_failed_rate": 0,
            "localize/no_error_rate": 0,
            "localize/too_long_rate": 0,
            "reset/prefix_cached_tokens": 0,
            # The seed 5 6 2 goes wrong in thought 1; 2 was named, and moved to 1 for want of room.
            "localize/exact_rate": 0,
            "localize/clean_rate": 0,
            "reset/clean_corrected_rate": 1 / 2,
        },
        rel=1e-12,
    )


def reset_metrics(thought: int, cause: str = "named") -> dict[str, float]:
    """Of one merged group whose seed 5 6 2 goes wrong in thought 1."""
    reset = Reset(seed_id="k1", thought=thought, cause=cause)
    seed = rollout("5\n6\n2", id="k1", of=KNOWN)
    right = rollout("5\n1", id="s0", of=KNOWN, stage="suffix", seed_id="k1", reward=1.0)
    return combine([rollout_sums([group(seed, right, resets=(reset,))], config())])


def test_a_reset_to_before_the_first_error_is_clean_without_being_exact():
    metrics = reset_metrics(0)
    assert (metrics["localize/exact_rate"], metrics["localize/clean_rate"]) == (0, 1)
    assert metrics["reset/empty_prefix_rate"] == 1
    assert metrics["reset/clean_corrected_rate"] == 1


def test_a_reset_that_keeps_the_first_error_is_neither_exact_nor_clean():
    metrics = reset_metrics(2)
    assert (metrics["localize/exact_rate"], metrics["localize/clean_rate"]) == (0, 0)
    assert metrics["reset/erroneous_corrected_rate"] == 1
    assert "reset/clean_corrected_rate" not in metrics


@pytest.mark.parametrize(
    "cause, unparsed, no_error", [("unparsed", 1, 0), ("no_error", 0, 1), ("named", 0, 0)]
)
def test_answers_that_name_no_thought_are_counted_by_cause(
    cause: str, unparsed: int, no_error: int
):
    metrics = reset_metrics(0, cause)
    assert metrics["localize/parse_failed_rate"] == unparsed
    assert metrics["localize/no_error_rate"] == no_error


def test_nothing_is_said_of_localization_where_the_task_does_not_know_the_truth():
    seed = rollout("5\n6", id="seed")
    reset = Reset(seed_id="seed", thought=0, cause="unparsed")
    metrics = combine([rollout_sums([group(seed, resets=(reset,))], config())])
    assert not {"localize/exact_rate", "localize/clean_rate"} & set(metrics)


def test_cut_thoughts_are_counted_among_all_thoughts():
    cut = rollout("12345\n6")
    assert [thought.was_cut for thought in cut.thoughts] == [True, False, False]
    assert combine([rollout_sums([group(cut)], config())])["thought/cut_rate"] == pytest.approx(
        1 / 3
    )


def test_a_failed_reward_is_in_no_mean():
    failed = rollout("x", id="f", failure="timeout")
    metrics = combine([rollout_sums([group(rollout("1", reward=1.0), failed)], config())])
    assert metrics["reward/failure_rate"] == 0.5
    assert metrics["reward/mean"] == metrics["reward/base_mean"] == metrics["pass_rate/base"] == 1
    assert metrics["group/zero_signal_rate"] == 1


def test_replicas_add_up_to_the_metrics_of_all_their_groups():
    base, suffix, fresh = step()
    whole = combine([rollout_sums([base, suffix, fresh], config())])
    parts = [rollout_sums([fresh], config()), rollout_sums([base, suffix], config())]
    assert combine(parts) == pytest.approx(whole, rel=1e-12)


def test_quotients_are_divided_after_they_are_added():
    shares = [{"rate": (1.0, 2.0), "sum": (3.0, 0.0)}, {"rate": (3.0, 6.0), "sum": (4.0, 0.0)}]
    assert combine(shares) == {"rate": 0.5, "sum": 7.0}
    assert combine([{"rate": (1.0, 1.0)}, {"rate": (0.0, 3.0)}]) == {"rate": 0.25}


def test_a_step_without_resets_says_so():
    rollouts: list[Rollout] = [rollout("1", reward=1.0), rollout("2")]
    metrics = combine([rollout_sums([group(*rollouts)], config())])
    assert metrics["reset/seed_found_rate"] == 0
    assert "reset/thought_index_mean" not in metrics

"""Every metric of a hand-made step, and replicas that add up to the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
            # Suffixes copy 2 of 4 and of 7 tokens; 7 rollouts of 33; fresh ones: 4, 6, 2, 2, 2.
            "payoff/fresh_pass_rate": 4 / 5,
            "payoff/reset_pass_rate": 1 / 2,
            "payoff/suffix_rate": 2 / 7,
            "payoff/own_share": (1 / 2 + 5 / 7) / 2,
            "payoff/credited_share": (1 / 2 + 5 / 7) / 2,
            "payoff/cost_mean": 33 / 7,
            "payoff/length_mean": 16 / 5,
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


def base_and_reset(thought: int, cause: str = "named", moved_from: int | None = None) -> Group:
    """One merged group whose seed 5 6 2 goes wrong in thought 1."""
    reset = Reset(seed_id="k1", thought=thought, cause=cause, moved_from=moved_from)
    seed = rollout("5\n6\n2", id="k1", of=KNOWN)
    right = rollout("5\n1", id="s0", of=KNOWN, stage="suffix", seed_id="k1", reward=1.0)
    return group(seed, right, resets=(reset,))


def reset_metrics(thought: int, cause: str = "named") -> dict[str, float]:
    return combine([rollout_sums([base_and_reset(thought, cause)], config())])


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


def test_a_verdict_is_judged_as_the_policy_gave_it_though_its_reset_was_moved():
    # Thought 2 of 5 6 2 was named; the first error, 1, is where the offset went.
    metrics = combine([rollout_sums([base_and_reset(1, moved_from=2)], config())])
    assert (metrics["localize/exact_rate"], metrics["localize/clean_rate"]) == (0, 0)
    assert metrics["reset/clean_corrected_rate"] == 1


@pytest.mark.parametrize("cause", ["unparsed", "no_error", "too_long", "random", "depth_matched"])
def test_only_a_verdict_is_judged(cause: str):
    metrics = reset_metrics(1, cause)
    assert not {"localize/exact_rate", "localize/clean_rate"} & set(metrics)
    assert metrics["reset/clean_corrected_rate"] == 1


def test_the_suffixes_of_a_reset_are_those_of_its_own_seed():
    seeds = [rollout("5\n6\n2", id="k1", of=KNOWN), rollout("5\n6\n9", id="k2", of=KNOWN)]
    resets = (
        Reset(seed_id="k1", thought=0, cause="named"),
        Reset(seed_id="k2", thought=2, cause="named"),
    )
    right, wrong = (
        rollout(text, id=f"s{i}", of=KNOWN, stage="suffix", seed_id=f"k{i}", reward=reward)
        for i, text, reward in ((1, "5\n1", 1.0), (2, "5\n2", 0.0))
    )
    metrics = combine([rollout_sums([group(*seeds, right, wrong, resets=resets)], config())])
    assert metrics["reset/clean_corrected_rate"] == 1
    assert metrics["reset/erroneous_corrected_rate"] == 0


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


def test_agreement_is_the_share_of_responses_with_two_verdicts_that_are_the_same():
    def scored(id: str, second: bool | None, **fields: Any) -> Rollout:
        made = rollout("1", id=id, **fields)
        return replace(made, score=replace(made.score, second_opinion=second))

    right, wrong, failed = {"reward": 1.0}, {"reward": 0.0}, {"failure": "timeout"}
    agreeing = (scored("a", False, **wrong), scored("b", False, **wrong))
    others = (scored("c", True, **wrong), scored("d", None, **right), scored("e", True, **failed))
    metrics = combine([rollout_sums([group(*agreeing, *others)], config())])
    assert metrics["reward/agreement"] == 2 / 3
    assert metrics["reward/mean"] == 1 / 4
    unasked = combine([rollout_sums([group(rollout("1", reward=1.0))], config())])
    assert "reward/agreement" not in unasked


def test_replicas_add_up_to_the_metrics_of_all_their_groups():
    base, suffix, fresh = step()
    whole = combine([rollout_sums([base, suffix, fresh], config())])
    parts = [rollout_sums([fresh], config()), rollout_sums([base, suffix], config())]
    assert combine(parts) == pytest.approx(whole, rel=1e-12)


def test_what_is_not_learned_from_is_in_the_token_counts_alone():
    # Own tokens: base 2 + 2, seeds 4 + 2, replaced base 3 and suffix 3.
    one, other = prompt(id="a"), prompt(id="b")
    lost = Reset(seed_id="a2", thought=0, cause="unparsed", num_tokens=7, num_cached_tokens=5)
    groups = [
        group(rollout("12", id="a2", of=one), use="replaced"),
        group(
            rollout("5\n34", id="a3", of=one, num_copied=2, seed_id="a2", num_cached_tokens=11),
            resets=(lost,),
            use="replaced",
        ),
        group(rollout("1", id="a4", of=one, reward=1.0), rollout("2", id="a5", of=one)),
        group(rollout("123", id="b0", of=other), rollout("4", id="b1", of=other), use="seeds"),
    ]
    cfg = config(algorithm={"num_rollouts": 4, "split": "2x1"})
    metrics = combine([rollout_sums(groups, cfg)])
    tokens = {name: value for name, value in metrics.items() if "tokens" in name}
    assert tokens == {
        "tokens/base": 4,
        "tokens/seed": 6,
        "tokens/replaced": 6,
        "tokens/localize": 7,
        "tokens/prefix_cached": 16,
        "reset/prefix_cached_tokens": 11,
    }
    assert metrics["reward/mean"] == 1 / 2
    assert metrics["group/num_mean"] == metrics["group/redrawn_rate"] == 1 / 2
    assert metrics["reset/seed_found_rate"] == 0
    assert not {name for name in metrics if name.startswith("localize/")}


def test_quotients_are_divided_after_they_are_added():
    shares = [{"rate": (1.0, 2.0), "sum": (3.0, 0.0)}, {"rate": (3.0, 6.0), "sum": (4.0, 0.0)}]
    assert combine(shares) == {"rate": 0.5, "sum": 7.0}
    assert combine([{"rate": (1.0, 1.0)}, {"rate": (0.0, 3.0)}]) == {"rate": 0.25}


def test_a_step_without_resets_says_so():
    rollouts: list[Rollout] = [rollout("1", reward=1.0), rollout("2")]
    metrics = combine([rollout_sums([group(*rollouts)], config())])
    assert metrics["reset/seed_found_rate"] == 0
    assert "reset/thought_index_mean" not in metrics


def test_a_suffix_whose_reward_failed_is_neither_corrected_nor_not():
    reset = Reset(seed_id="k1", thought=1, cause="named")
    seed = rollout("5\n6\n2", id="k1", of=KNOWN)
    suffixes = [
        rollout("5\n1", id=f"s{i}", of=KNOWN, num_copied=2, seed_id="k1", **fields)
        for i, fields in enumerate(({"reward": 1.0}, {}, {"failure": "timeout"}))
    ]
    groups = [group(seed), group(*suffixes, resets=(reset,))]
    metrics = combine([rollout_sums(groups, config())])
    assert metrics["reset/clean_corrected_rate"] == metrics["pass_rate/suffix"] == 0.5


def test_a_method_without_seeds_says_nothing_of_finding_them():
    cfg = config(algorithm={"resets": "none"})
    metrics = combine([rollout_sums([group(rollout("1", reward=1.0))], cfg)])
    assert "reset/seed_found_rate" not in metrics

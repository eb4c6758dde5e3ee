"""Group-normalised credit against a float64 reference and numbers worked out by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_srpo.advantages import CREDITS, GroupNormalized, credited
from megatron_srpo.types import AlarmError, Floats, Group
from tests.unit.builders import config, group, prompt, rewarded, rollout

VALUES = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))


def advantages(of: Group, **credit: str) -> list[float]:
    """One per rollout, read at its last token."""
    (credits,) = GroupNormalized(config(credit=credit)).assign([of])
    return [float(advantage[-1]) for _, advantage in credits]


def test_one_right_of_four_gets_root_three_and_the_others_minus_a_root_third():
    # mean 1/4, population std sqrt(3)/4; the sample std would give 1.5 and -0.5.
    expected = [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]
    assert advantages(rewarded(1, 0, 0, 0)) == pytest.approx(expected, rel=1e-6)


def test_graded_rewards_are_divided_by_their_own_spread():
    # 0 1 2 5: mean 2, squares 4 1 0 9, variance 14/4.
    std = math.sqrt(3.5)
    expected = [-2 / std, -1 / std, 0, 3 / std]
    assert advantages(rewarded(0, 1, 2, 5)) == pytest.approx(expected, rel=1e-6)


@given(st.lists(VALUES, min_size=2, max_size=12))
def test_advantages_are_the_float64_reference_for_any_rewards(rewards: list[float]):
    std = statistics.pstdev(rewards)
    mean = statistics.fmean(rewards)
    same = len(set(rewards)) == 1
    expected = [0.0 if same else (reward - mean) / std for reward in rewards]
    assert advantages(rewarded(*rewards)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.3])
def test_a_group_without_signal_gets_exactly_zero(reward: float):
    # The mean of equal floats need not equal them: 0.1 summed three times is not 0.3.
    for size in (1, 3, 7):
        assert advantages(rewarded(*[reward] * size)) == [0.0] * size


def test_each_group_is_measured_against_itself_alone():
    right, mixed = rewarded(1, 1, 1), rewarded(1, 0)
    first, second = GroupNormalized(config()).assign([right, mixed])
    assert [float(advantage[0]) for _, advantage in first] == [0, 0, 0]
    assert [float(advantage[0]) for _, advantage in second] == [1, -1]


def test_weights_are_one_over_the_number_of_own_tokens_and_zero_on_the_copied_prefix():
    whole, continued = rollout("abc", reward=1.0), rollout("abcde", num_copied=2)
    (((weight, advantage), (own_weight, own_advantage)),) = GroupNormalized(config()).assign(
        [group(whole, continued)]
    )
    assert weight.tolist() == [0.25] * 4
    assert advantage.tolist() == [1] * 4
    assert own_weight.tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]
    assert own_advantage.tolist() == [0, 0, -1, -1, -1, -1]


def test_a_reward_that_failed_is_no_reward_of_zero():
    failed = rollout("abc", failure="timeout")
    right, wrong = rollout("abc", reward=1.0), rollout("abc")
    assert advantages(group(right, failed, wrong, right)) == pytest.approx(
        [0.5**0.5, 0, -(2**0.5), 0.5**0.5], rel=1e-6
    )
    ((_, (weight, advantage), _, _),) = GroupNormalized(config()).assign(
        [group(right, failed, wrong, right)]
    )
    assert weight.tolist() == advantage.tolist() == [0] * 4


def test_a_group_of_failed_rewards_only_has_no_weight_and_no_nan():
    failed = rollout("ab", failure="timeout")
    for weight, advantage in GroupNormalized(config()).assign([group(failed, failed)])[0]:
        assert weight.tolist() == advantage.tolist() == [0, 0, 0]


def test_a_failed_rewards_value_does_not_make_a_group_look_as_if_it_had_signal():
    failed = rollout("ab", reward=5.0, failure="timeout")
    right = rollout("ab", reward=1.0)
    assert advantages(group(right, failed, right)) == [0, 0, 0]


@given(st.lists(VALUES, min_size=2, max_size=8), st.floats(0.5, 20), VALUES)
def test_shifting_and_scaling_rewards_changes_no_advantage(
    rewards: list[float], scale: float, shift: float
):
    moved = [scale * reward + shift for reward in rewards]
    if len(set(rewards)) > 1:
        # Rewards lie on a grid of 1/1000, so scaling keeps them apart.
        np.testing.assert_allclose(
            advantages(rewarded(*moved)), advantages(rewarded(*rewards)), atol=1e-4
        )


# --- other conventions --------------------------------------------------------------------------


def test_the_sample_std_is_the_one_with_a_degree_of_freedom_less():
    # Mean 1/4, sample variance (9 + 1 + 1 + 1)/16/3 = 1/4.
    assert advantages(rewarded(1, 0, 0, 0), std="sample") == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_without_a_std_the_advantage_is_the_difference_itself():
    assert advantages(rewarded(0, 1, 2, 5), std="none") == [-2, -1, 0, 3]


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    # 0 against (1 + 2 + 5)/3, 1 against 7/3, 2 against 2, 5 against 1.
    found = advantages(rewarded(0, 1, 2, 5), baseline="leave_one_out", std="none")
    assert found == pytest.approx([-8 / 3, -4 / 3, 0, 4])


def test_leaving_one_out_keeps_the_std_of_all():
    # 0 1: against each other -1 and 1, over the population std 1/2.
    assert advantages(rewarded(0, 1), baseline="leave_one_out") == pytest.approx([-2, 2])


def test_leaving_one_out_leaves_rewards_that_failed_out_too():
    of = group(rollout("a"), rollout("a", failure="timeout"), rollout("a", reward=1.0))
    assert advantages(of, baseline="leave_one_out", std="none") == [-1, 0, 1]


def test_a_group_of_one_has_no_advantage_by_any_convention():
    for baseline in ("mean", "leave_one_out"):
        for std in ("population", "sample", "none"):
            assert advantages(rewarded(1), baseline=baseline, std=std) == [0]


def test_token_means_give_every_own_token_the_same_weight():
    whole, continued = rollout("abc", reward=1.0), rollout("abcde", num_copied=2)
    rule = GroupNormalized(config(credit={"aggregation": "token_mean"}))
    (((weight, _), (own_weight, _)),) = rule.assign([group(whole, continued)])
    assert weight.tolist() == [1] * 4
    assert own_weight.tolist() == [0, 0, 1, 1, 1, 1]


# --- a rule of the user's -----------------------------------------------------------------------


class Constant:
    """This weight and credit on every token, or on one token fewer."""

    def __init__(self, weight: float, credit: float = 1.0, *, short: bool = False) -> None:
        self._weight, self._value, self._short = weight, credit, short

    def assign(self, groups: Sequence[Group]) -> list[list[tuple[Floats, Floats]]]:
        return [[self._credit(len(r.token_ids)) for r in g.rollouts] for g in groups]

    def _credit(self, length: int) -> tuple[Floats, Floats]:
        ones = np.ones(length - self._short, np.float32)
        return ones * np.float32(self._weight), ones * np.float32(self._value)


class Ungrouped(Constant):
    """The same in one list, for all groups together."""

    def assign(self, groups: Sequence[Group]) -> list[list[tuple[Floats, Floats]]]:
        return [[credit for credits in super().assign(groups) for credit in credits]]


def test_a_rule_sees_only_the_groups_that_are_trained():
    trained, seeds = rewarded(1, 0), group(rollout("abc"), use="seeds")
    found = [(r.id, weight.tolist()) for r, weight, _ in credited([seeds, trained], Constant(0.5))]
    assert found == [("r0", [0.5] * 4), ("r1", [0.5] * 4)]


def test_credit_that_does_not_fit_a_response_is_refused():
    with pytest.raises(AlarmError, match="each as long as the response"):
        [*credited([rewarded(1, 0)], Constant(1.0, short=True))]


def test_credit_that_is_not_grouped_as_the_rollouts_are_is_refused():
    with pytest.raises(AlarmError, match="for every rollout of every group"):
        [*credited([rewarded(1, 0), rewarded(0, 1)], Ungrouped(1.0))]


@pytest.mark.parametrize("weight, credit", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_credit_that_is_not_finite_is_refused_by_name(weight: float, credit: float):
    with pytest.raises(AlarmError, match="the credit rule's answer for r0 is not finite"):
        [*credited([rewarded(1, 0)], Constant(weight, credit))]


def test_credit_that_weighs_less_than_nothing_is_refused_by_name():
    with pytest.raises(AlarmError, match="gave r0 a negative loss_weight"):
        [*credited([rewarded(1, 0)], Constant(-1.0))]


# --- base and suffixes together -----------------------------------------------------------------


def branching(*, suffixes: tuple[float, ...] = (1, 0)) -> list[Group]:
    """Two base rollouts of 4 tokens, one right; suffixes that copied 2 of their 5 tokens."""
    base = group(rollout("abc", id="b0", reward=1.0), rollout("abc", id="b1"))
    members = [
        rollout("abxy", id=f"s{i}", reward=reward, num_copied=2, seed_id="b1")
        for i, reward in enumerate(suffixes)
    ]
    return [base, group(*members)]


def assigned(groups: list[Group], **credit: Any) -> dict[str, tuple[Floats, Floats]]:
    cfg = config(credit=credit)
    credits = CREDITS[cfg.credit.rule](cfg).assign(groups)
    return {
        rollout.id: credit
        for of, given in zip(groups, credits, strict=True)
        for rollout, credit in zip(of.rollouts, given, strict=True)
    }


def test_pooled_credit_has_one_mean_and_one_std_for_all_rollouts_of_a_prompt():
    # 1 0 1 1: mean 3/4, std sqrt(3)/4. Group by group the suffixes would have no signal.
    right, wrong = 1 / math.sqrt(3), -math.sqrt(3)
    given = assigned(branching(suffixes=(1, 1)), rule="pooled")
    for id, own in {"b0": right, "b1": wrong, "s0": right, "s1": right}.items():
        assert given[id][1][-1] == pytest.approx(own, rel=1e-6)
    weight, advantage = given["s0"]
    assert weight.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert advantage[:2].tolist() == [0, 0]


def test_prompts_are_pooled_apart():
    other = [
        group(rollout("abc", id="o0", of=prompt(id="o"), reward=1.0)),
        group(rollout("abc", id="o1", of=prompt(id="o"), reward=1.0)),
    ]
    given = assigned([*branching(), *other], rule="pooled")
    assert given["o0"][1].tolist() == given["o1"][1].tolist() == [0] * 4
    assert given["b0"][1][0] == 1  # 1 0 1 0: mean and std 1/2


def test_chain_credit_gives_the_copied_prefix_its_reward_in_units_of_the_spread():
    # Rewards 1 0 1 0: std 1/2; a right suffix's prefix has 1 / (1/2), times the weight.
    given = assigned(branching(), rule="chain", prefix_weight=0.25)
    weight, advantage = given["s0"]
    assert weight.tolist() == pytest.approx([1 / 5] * 5)
    assert advantage.tolist() == [0.5, 0.5, 1, 1, 1]
    assert given["s1"][1].tolist() == [0, 0, -1, -1, -1]  # no baseline: a wrong one says nothing
    assert given["b1"][1].tolist() == [-1] * 4


def test_where_all_rewards_of_a_prompt_agree_its_prefixes_have_no_credit_either():
    right = [group(rollout("abc", id="b", reward=1.0)), *branching(suffixes=(1, 1))[1:]]
    for _, advantage in assigned(right, rule="chain").values():
        assert not advantage.any()


def test_a_suffix_without_a_verdict_credits_no_prefix():
    base, _ = branching()
    failed = rollout("abxy", id="s0", reward=1.0, failure="died", num_copied=2, seed_id="b1")
    weight, advantage = assigned([base, group(failed)], rule="chain")["s0"]
    assert not weight.any() and not advantage.any()


def test_half_a_baseline_leaves_a_tilt_towards_what_was_right():
    # Mean 1/4, half of it 1/8; std sqrt(3)/4.
    std = math.sqrt(3) / 4
    expected = [0.875 / std, *[-0.125 / std] * 3]
    assert advantages(rewarded(1, 0, 0, 0), baseline="half") == pytest.approx(expected, rel=1e-6)
    assert advantages(rewarded(1, 1, 1), baseline="half") == [0, 0, 0]


def test_rules_keep_to_the_other_conventions():
    given = assigned(branching(), rule="chain", std="none", aggregation="token_mean")
    weight, advantage = given["s0"]
    assert weight.tolist() == [1] * 5
    assert advantage.tolist() == [1, 1, 0.5, 0.5, 0.5]
    loo = assigned(branching(), rule="pooled", baseline="leave_one_out", std="none")
    assert loo["b0"][1][0] == pytest.approx(1 - 1 / 3)

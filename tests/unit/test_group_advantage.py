"""Advantages on a device are those that the loop assigns."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from megatron_srpo.kernels.group_advantage import Baseline, Std, group_advantage
from tests.unit.advantage_cases import GROUPS, by_the_loop, flat

OP: Any = torch.ops.megatron_srpo.group_advantage


@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("std", get_args(Std))
def test_advantages_are_those_of_the_loop(baseline: Baseline, std: Std):
    found = group_advantage(*flat(GROUPS), baseline=baseline, std=std)
    right = torch.tensor(by_the_loop(GROUPS, baseline=baseline, std=std))
    torch.testing.assert_close(found, right, rtol=2e-7, atol=1e-9)


def test_one_right_of_four_gets_root_three():
    found = group_advantage(torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 4]))
    torch.testing.assert_close(found, torch.tensor([3**0.5, *[-(3**-0.5)] * 3]))


@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("std", get_args(Std))
def test_a_group_whose_rewards_agree_gets_exactly_zero(baseline: Baseline, std: Std):
    for size in (0, 1, 3, 7):
        rewards, offsets = flat([[1, 0], [0.1] * size, [0, 2]])
        found = group_advantage(rewards, offsets, baseline=baseline, std=std)
        assert found[2:-2].tolist() == [0.0] * size and found[[0, 1, -2, -1]].abs().min() > 0


def test_no_groups_have_no_advantages():
    assert group_advantage(torch.zeros(0), torch.zeros(1, dtype=torch.int64)).shape == (0,)


def test_a_reward_that_is_no_number_does_not_hide_and_stays_in_its_group():
    found = group_advantage(*flat([[1, 0], [float("nan"), 1.0]]))
    assert found[:2].tolist() == [1.0, -1.0]


def test_more_groups_than_a_grid_has_in_its_second_dimension():
    rewards = torch.arange(140_000.0)
    found = group_advantage(rewards, torch.arange(0, 140_001, 2))
    assert torch.equal(found, torch.tensor([-1.0, 1.0]).repeat(70_000))


@pytest.mark.parametrize("groups", [GROUPS, []], ids=["groups", "nothing"])
def test_the_operation_is_registered_as_torch_wants_it(groups: list[list[float]]):
    outcome = torch.library.opcheck(OP, (*flat(groups), "leave_one_out", "sample"))
    assert set(outcome.values()) == {"SUCCESS"}


def test_it_compiles_into_one_graph():
    case = flat(GROUPS)
    compiled = torch.compile(group_advantage, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(disable=False):  # the engines' environment turns it off
        assert torch.equal(compiled(*case), group_advantage(*case))


def test_two_runs_give_the_same_bits():
    case = flat(GROUPS)
    assert torch.equal(group_advantage(*case), group_advantage(*case))

"""The loss as one operation: all that is said of the formulas, and that it gives the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_srpo import loss as formulas
from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels import policy_loss as operation
from megatron_srpo.loss import TokenTensors, to_metrics
from tests.unit import test_loss
from tests.unit.loss_cases import LOSSES, assert_same_counters, nothing
from tests.unit.test_loss import *  # noqa: F403  every property of the formulas, of the operation
from tests.unit.test_loss import drawn

OP: Any = torch.ops.megatron_srpo.policy_loss


@pytest.fixture(autouse=True)
def by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_loss, "policy_loss", operation.policy_loss)


def by_logprobs(loss: Any, logprobs: Tensor, *others: Any) -> tuple[Tensor, Tensor, Any]:
    """Loss, its gradient, counters."""
    logprobs = logprobs.clone().requires_grad_()
    value, counters = loss(logprobs, *others, denominator=3.0)
    (gradient,) = torch.autograd.grad(2 * value, logprobs)
    return value.detach(), gradient, counters


@pytest.mark.parametrize("cfg", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("lengths", [[1], [40], [9, 6, 5, 30]])
def test_loss_gradient_and_counters_are_those_of_the_formulas(cfg: LossConfig, lengths: list[int]):
    logprobs, tokens = drawn(3, lengths)
    found = by_logprobs(operation.policy_loss, logprobs, tokens, cfg)
    right = by_logprobs(formulas.policy_loss, logprobs, tokens, cfg)
    torch.testing.assert_close(found[:2], right[:2], rtol=1e-13, atol=1e-13)
    assert_same_counters(found[2], right[2], rel=1e-13)


@pytest.mark.parametrize("cfg", LOSSES.values(), ids=LOSSES)
def test_no_tokens_and_no_trained_tokens_have_no_loss(cfg: LossConfig):
    logprobs, tokens = drawn(3, [8])
    for case in (nothing(tokens), (logprobs, silent(tokens))):
        value, gradient, counters = by_logprobs(operation.policy_loss, *case, cfg)
        assert value == 0 and torch.equal(gradient, torch.zeros_like(case[0]))
        metrics = to_metrics(counters)
        assert metrics.pop("mismatch/ess") == 1.0 and set(metrics.values()) == {0.0}


def silent(tokens: TokenTensors) -> TokenTensors:
    return TokenTensors(
        loss_weight_T=torch.zeros_like(tokens.loss_weight_T),
        advantage_T=tokens.advantage_T,
        rollout_T=tokens.rollout_T,
        old_T=tokens.old_T,
        reference_T=tokens.reference_T,
        cu_seqlens=tokens.cu_seqlens,
    )


@pytest.mark.parametrize("name", ["reinforce", "everything"])
def test_the_operation_is_registered_as_torch_wants_it(name: str):
    logprobs, tokens = drawn(3, [5, 4])
    others = operation.arguments(tokens, LOSSES[name], 3.0)
    outcome = torch.library.opcheck(OP, (logprobs.requires_grad_(), *others))
    assert set(outcome.values()) == {"SUCCESS"}


def test_the_gradient_passes_torch_s_own_check():
    logprobs, tokens = drawn(3, [5, 4])

    def value(logprobs: Tensor) -> Tensor:
        return operation.policy_loss(logprobs, tokens, LOSSES["everything"], denominator=3.0)[0]

    assert torch.autograd.gradcheck(value, logprobs.requires_grad_())


def test_it_compiles_into_one_graph_forward_and_backward():
    logprobs, tokens = drawn(3, [5, 4])
    others = operation.arguments(tokens, LOSSES["everything"], 3.0)
    logprobs.requires_grad_()
    compiled = torch.compile(lambda x: OP(x, *others)[0], fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(disable=False):  # the engines' environment turns it off
        right, found = OP(logprobs, *others)[0], compiled(logprobs)
    assert torch.equal(right, found)
    (one,), (other,) = (torch.autograd.grad(x, logprobs) for x in (right, found))
    assert torch.equal(one, other)


def test_counters_are_views_of_what_the_operation_gives():
    """On a GPU each number that is made of them is another launch."""
    totals = torch.arange(float(len(operation.TOTALS))).double()
    totals[-1] = 0
    counted = operation.counters(totals, LOSSES["everything"])
    numbers = [*itertools.chain(*counted.quotients.values()), *counted.maxima.values()]
    storages = {number.untyped_storage().data_ptr() for number in numbers}
    assert storages == {totals.untyped_storage().data_ptr()}
    assert counted.quotients["loss"][1] == 0 and counted.maxima["loss/ratio_max"] == 13

"""Head and loss in one pass are head and loss one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels import linear_policy_loss as linear_policy_loss_module
from megatron_srpo.kernels import rows
from megatron_srpo.kernels.linear_logprob import linear_logprob
from megatron_srpo.kernels.linear_policy_loss import linear_policy_loss
from megatron_srpo.loss import Counters, TokenTensors, policy_loss
from tests.unit.head_cases import Case, alive_products, assert_same, drawn, written_out
from tests.unit.loss_cases import LOSSES, SEPARABLE, assert_same_counters, in_fp32, nothing
from tests.unit.test_loss import drawn as drawn_tokens

OP: Any = torch.ops.megatron_srpo.linear_policy_loss
Found = tuple[Tensor, Counters, Tensor, Tensor]
Problem = tuple[Case, TokenTensors]


def problem(
    num_rows: int, vocab: int, hidden: int = 5, *, dtype: torch.dtype = torch.float64
) -> Problem:
    """Policies that differ by what a few updates do."""
    case = drawn(num_rows, vocab, hidden, dtype=dtype)
    case[1].mul_(hidden**-0.5)
    logprobs, _ = written_out(case)
    before, tokens = drawn_tokens(num_rows, [num_rows])
    assert tokens.old_T is not None and tokens.reference_T is not None
    off = logprobs - before
    return case, TokenTensors(
        loss_weight_T=tokens.loss_weight_T,
        advantage_T=tokens.advantage_T,
        rollout_T=tokens.rollout_T + off,
        old_T=tokens.old_T + off,
        reference_T=tokens.reference_T + off,
        cu_seqlens=tokens.cu_seqlens,
    )


def one_pass(case: Case, tokens: TokenTensors, cfg: LossConfig, **options: Any) -> Found:
    return linear_policy_loss(
        *case[:3], tokens, cfg, denominator=3.0, temperature=case[3], **options
    )


def in_turn(case: Case, tokens: TokenTensors, cfg: LossConfig) -> Found:
    """float64, with all logits."""
    logprobs, entropies = written_out(case)
    return *policy_loss(logprobs, tokens, cfg, denominator=3.0), logprobs, entropies


def gradients(found: Found, to: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(2.5 * found[0], to)


def assert_right(problem: Problem, cfg: LossConfig, **options: Any) -> None:
    """Loss, counters, log-probs, entropies, gradients, in float64."""
    (hidden, weight, *others), tokens = problem
    inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    found = one_pass((*inputs, *others), tokens, cfg, **options)
    right = in_turn((*inputs, *others), tokens, cfg)
    assert_same([found[0], *found[2:]], [right[0], *right[2:]])
    assert_same_counters(found[1], right[1], rel=1e-11)
    assert_same(gradients(found, inputs), gradients(right, inputs), atol=1e-11)


def rows_of(block: int, vocab: int) -> int:
    """A workspace that has room for so many rows."""
    return block * vocab * 8


@pytest.mark.parametrize("cfg", SEPARABLE.values(), ids=SEPARABLE)
def test_every_separable_loss_is_that_of_head_and_loss_in_turn(cfg: LossConfig):
    assert_right(problem(20, 37), cfg, workspace=rows_of(7, 37), chunk=10)


@pytest.mark.parametrize("vocab", [1, 2, 37, 64])
@pytest.mark.parametrize(("block", "chunk"), [(1, 1), (3, 7), (100, 8192)])
def test_neither_blocks_nor_chunks_change_anything(vocab: int, block: int, chunk: int):
    workspace = rows_of(block, vocab)
    assert_right(problem(10, vocab), LOSSES["everything"], workspace=workspace, chunk=chunk)


def test_the_logits_of_one_block_are_there_at_a_time_and_blocks_are_equal(
    monkeypatch: pytest.MonkeyPatch,
):
    made, numbers = alive_products(monkeypatch, linear_policy_loss_module)
    case, tokens = problem(8, 37)
    case[0].requires_grad_()
    one_pass(case, tokens, LOSSES["ppo"], workspace=rows_of(7, 37), chunk=10)
    assert numbers == [1, 2, 3, 4] * 2 and not any(one() is not None for one in made)
    sizes: list[int] = []
    absorb = rows.absorb

    def measured(stats: Tensor, logits: Tensor, *others: Tensor) -> None:
        sizes.append(len(logits))
        absorb(stats, logits, *others)

    monkeypatch.setattr(rows, "absorb", measured)
    one_pass(case, tokens, LOSSES["ppo"], workspace=rows_of(7, 37))
    assert sizes == [4, 4]


def test_a_workspace_too_small_for_a_row_has_room_for_one():
    assert_right(problem(5, 37), LOSSES["ppo"], workspace=1)


@pytest.mark.parametrize("name", ["sequence_truncate", "sequence_mask"])
def test_a_loss_that_weighs_whole_responses_is_refused(name: str):
    with pytest.raises(ValueError, match=f"importance={name} weighs whole responses"):
        one_pass(*problem(5, 9), LOSSES[name])


def test_the_gradient_is_that_of_finite_differences_and_is_there_once():
    # torch's own gradcheck asks several times.
    (hidden, weight, *others), tokens = problem(4, 7, 3)
    eps, options = 1e-6, {"workspace": rows_of(3, 7), "chunk": 4}

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        case = hidden, weight, *others
        return one_pass(case, tokens, LOSSES["everything"], **options)[0]

    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = value(*inputs)
    found = torch.autograd.grad(loss, inputs, retain_graph=True)
    for place in range(weight.numel()):
        step = torch.zeros(weight.numel()).double().index_fill(0, torch.tensor(place), eps)
        step = step.view_as(weight)
        slope = (value(hidden, weight + step) - value(hidden, weight - step)) / (2 * eps)
        assert found[1].view(-1)[place].item() == pytest.approx(slope.item(), abs=1e-8)
    for place in range(hidden.numel()):
        step = torch.zeros(hidden.numel()).double().index_fill(0, torch.tensor(place), eps)
        step = step.view_as(hidden)
        slope = (value(hidden + step, weight) - value(hidden - step, weight)) / (2 * eps)
        assert found[0].view(-1)[place].item() == pytest.approx(slope.item(), abs=1e-8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)


def raw(case: Case, tokens: TokenTensors) -> tuple[Any, ...]:
    """Arguments of the operation."""
    known = tokens.loss_weight_T, tokens.advantage_T, tokens.rollout_T
    how = "ppo", "token_mask", 0.2, 0.3, 0.1, 1.2, 3.0
    others = tokens.old_T, tokens.reference_T, tokens.cu_seqlens
    return *case, *known, *others, *how, 0, len(case[1]), "", 3, 4


@pytest.mark.parametrize("num_rows", [0, 7])
def test_the_operation_is_registered_as_torch_wants_it(num_rows: int):
    case, tokens = problem(7, 9)
    if not num_rows:
        case, tokens = drawn(0, 9), nothing(tokens)[1]
    for tensor in case[:2]:
        tensor.requires_grad_()
    # The fourth of torch's checks hands the gradients out, which the backward pass overwrites;
    # nobody else sees them, and the next test is that check without them.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    outcome = torch.library.opcheck(OP, raw(case, tokens), test_utils=checks)
    assert set(outcome.values()) == {"SUCCESS"}


def test_it_compiles_into_one_graph_forward_and_backward():
    case, tokens = problem(7, 9)
    inputs = [x.requires_grad_() for x in case[:2]]
    others = raw(case, tokens)[2:]
    compiled = torch.compile(
        lambda hidden, weight: OP(hidden, weight, *others)[0], fullgraph=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(disable=False):  # the engines' environment turns it off
        right, found = OP(*inputs, *others)[0], compiled(*inputs)
    assert_same([found], [right])
    assert_same(torch.autograd.grad(found, inputs), torch.autograd.grad(right, inputs))


def test_no_rows_have_no_loss_and_gradients_of_zero():
    case, (_, tokens) = drawn(0, 9), nothing(problem(5, 9)[1])
    inputs = [x.requires_grad_() for x in case[:2]]
    found = one_pass(case, tokens, LOSSES["everything"])
    assert found[0].item() == 0
    assert all(not x.any() for x in gradients(found, inputs))
    _, right = policy_loss(torch.zeros(0).double(), tokens, LOSSES["everything"], denominator=3.0)
    assert_same_counters(found[1], right, rel=0)


def test_rows_of_the_weight_that_are_no_tokens_have_no_part_in_it():
    (hidden, weight, targets, temperature), tokens = problem(6, 13)
    padded = torch.cat([weight, torch.full((7, 5), float("nan")).double()]).requires_grad_()
    cfg = LOSSES["reinforce"]
    found = one_pass((hidden, padded, targets, temperature), tokens, cfg, num_real=13, chunk=5)
    right = in_turn((hidden, weight.requires_grad_(), targets, temperature), tokens, cfg)
    assert_same([found[0]], [right[0]])
    (by_padded,), (by_weight,) = gradients(found, [padded]), gradients(right, [weight])
    assert_same([by_padded[:13]], [by_weight])
    assert torch.equal(by_padded[13:], torch.zeros(7, 5).double())


def test_log_probs_and_entropies_have_no_gradient():
    case, tokens = problem(5, 9)
    _, _, logprobs, entropies = one_pass(
        (case[0].requires_grad_(), *case[1:]), tokens, LOSSES["reinforce"]
    )
    assert not logprobs.requires_grad and not entropies.requires_grad


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_fp32_and_bfloat16_are_float64_but_for_rounding(dtype: torch.dtype, rounding: float):
    case, tokens = problem(64, 3000, 64, dtype=dtype)
    inputs = [x.requires_grad_() for x in case[:2]]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    others = case[2], case[3].float()
    found = one_pass(
        (*inputs, *others), in_fp32(tokens), LOSSES["ppo"], workspace=rows_of(10, 3000), chunk=700
    )
    right = in_turn((*wide, *others), tokens, LOSSES["ppo"])
    assert_same(found[2:], right[2:], atol=5e-6)
    torch.testing.assert_close(found[0].double(), right[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(found, inputs), gradients(right, wide), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < rounding * other.abs().max()


def test_an_impossible_target_has_an_infinite_loss_and_others_keep_theirs():
    hidden, weight = torch.tensor([[1e20, 1.0], [0.0, 1.0]]), torch.tensor([[-1e20, 0.0], [0, 1]])
    case = hidden, weight, torch.tensor([0, 0]), torch.ones(2)
    tokens = in_fp32(drawn_tokens(0, [2])[1])
    _, _, logprobs, entropies = one_pass(case, tokens, LOSSES["reinforce"])
    assert logprobs[0].item() == -torch.inf and entropies[0].item() == 0
    assert torch.isfinite(logprobs[1])


def test_it_is_head_and_loss_in_turn_to_rounding_also_in_fp32_and_the_same_bits_twice():
    case, tokens = problem(50, 999, 32, dtype=torch.float32)
    tokens, runs = in_fp32(tokens), []
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for x in case[:2]]
        found = one_pass(
            (*inputs, case[2], case[3].float()), tokens, LOSSES["everything"], chunk=100
        )
        runs.append((found[0], *found[2:], *gradients(found, inputs)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    logprobs, _ = linear_logprob(*case[:3], temperature=case[3].float(), chunk=100)
    assert torch.equal(runs[0][1], logprobs)


def test_more_rows_than_a_grid_has_in_its_second_dimension():
    assert_right(problem(70_000, 3, 2), LOSSES["ppo"], workspace=rows_of(66_000, 3))

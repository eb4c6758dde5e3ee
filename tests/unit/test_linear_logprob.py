"""Log-prob and entropy from hidden states, against float64 written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_srpo.kernels import linear_logprob as linear_logprob_module
from megatron_srpo.kernels.linear_logprob import linear_logprob
from tests.unit.head_cases import (
    Case,
    alive_products,
    assert_same,
    drawn,
    gradients,
    written_out,
)

OP: Any = torch.ops.megatron_srpo.linear_logprob


def assert_right(case: Case, **options: Any) -> None:
    """Values and gradients, in float64."""
    hidden, weight = (x.detach().requires_grad_() for x in case[:2])
    found = linear_logprob(hidden, weight, case[2], temperature=case[3], **options)
    right = written_out((hidden, weight, *case[2:]))
    assert_same(found, right)
    assert_same(gradients(found, [hidden, weight]), gradients(right, [hidden, weight]))


@pytest.mark.parametrize("vocab", [1, 2, 37, 64, 101])
@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
def test_values_and_gradients_are_those_written_out_whatever_vocabulary_and_chunk(
    vocab: int, chunk: int
):
    assert_right(drawn(6, vocab), chunk=chunk)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets, temperature = drawn(4, 11, 3)

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets, temperature=temperature, chunk=4)

    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_the_operation_is_registered_as_torch_wants_it(num_rows: int):
    hidden, weight, targets, temperature = drawn(num_rows, 11)
    case = hidden.requires_grad_(), weight.requires_grad_(), targets, temperature
    outcome = torch.library.opcheck(OP, (*case, 0, 9, "", 4))
    assert set(outcome.values()) == {"SUCCESS"}


def test_it_compiles_into_one_graph_forward_and_backward():
    hidden, weight, targets, temperature = drawn(5, 13)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets, temperature=temperature, chunk=4)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(disable=False):  # the engines' environment turns it off
        right, found = loss(*inputs), compiled(*inputs)
    assert_same(found, right)
    assert_same(gradients(found, inputs), gradients(right, inputs))


def test_one_temperature_stands_for_all_rows():
    hidden, weight, targets, temperature = drawn(5, 13)
    found = linear_logprob(hidden, weight, targets, temperature=0.7)
    assert_same(found, written_out((hidden, weight, targets, temperature * 0 + 0.7)))


def test_only_log_probs_or_only_entropies_may_have_a_gradient():
    case = drawn(5, 13)
    for used in (0, 1):
        weights = [case[1].clone().requires_grad_() for _ in range(2)]
        found = linear_logprob(case[0], weights[0], case[2], temperature=case[3])[used]
        right = written_out((case[0], weights[1], *case[2:]))[used]
        found.sum().backward()
        right.sum().backward()
        assert_same([weights[0].grad], [weights[1].grad])


def test_rows_of_the_weight_that_are_no_tokens_have_no_part_in_it():
    hidden, weight, targets, temperature = drawn(6, 20)
    real = targets % 13
    padded = weight.clone()
    padded[13:] = float("nan")
    padded.requires_grad_()
    found = linear_logprob(hidden, padded, real, temperature=temperature, num_real=13, chunk=5)
    assert_same(found, written_out((hidden, weight[:13], real, temperature)))
    (by_weight,) = gradients(found, [padded])
    assert by_weight[:13].abs().min() > 0
    assert torch.equal(by_weight[13:], torch.zeros_like(by_weight[13:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weight_s_gradient_may_be_added_to_what_is_there_instead(dtype: torch.dtype):
    hidden, weight, targets, temperature = drawn(6, 20, dtype=dtype)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    before = torch.linspace(-1, 1, 100, dtype=wide).view(20, 5)
    main_grad, options = before.clone(), {"num_real": 13, "chunk": 5}
    case = *inputs, targets % 13
    right = linear_logprob(*case, temperature=temperature, **options)
    found = linear_logprob(*case, temperature=temperature, **options, main_grad_VH=main_grad)
    by_hidden, by_weight = gradients(found, inputs)
    assert torch.equal(main_grad[13:], before[13:]) and not by_weight.any()
    right_by_hidden, right_by_weight = gradients(right, inputs)
    assert torch.equal(by_hidden, right_by_hidden)
    rounding = 1e-12 if dtype == torch.float64 else 2e-2  # the other one is rounded to bfloat16
    torch.testing.assert_close(
        (main_grad - before).double(), right_by_weight.double(), rtol=rounding, atol=rounding
    )
    gradients(
        linear_logprob(*case, temperature=temperature, **options, main_grad_VH=main_grad), inputs
    )
    if dtype == torch.float64:
        torch.testing.assert_close(main_grad - before, 2 * right_by_weight)


def test_a_gradient_that_is_added_to_what_is_there_is_registered_as_torch_wants_it():
    hidden, weight, targets, temperature = drawn(5, 11)
    softmax, by_output = torch.rand(3, 5).double(), torch.rand(2, 5).double()
    tensors = hidden, weight, targets, temperature, softmax, by_output
    backward: Any = torch.ops.megatron_srpo.linear_logprob_backward
    outcome = torch.library.opcheck(backward, (*tensors, 0, 9, 4, torch.zeros_like(weight)))
    assert set(outcome.values()) == {"SUCCESS"}


def test_what_the_operation_writes_to_has_no_default():
    """The dispatcher strips arguments that equal their defaults, and torch 2.11 then looks for
    the one that changes: `IndexError` in every backward pass."""
    backward: Any = torch.ops.megatron_srpo.linear_logprob_backward
    written = [a for a in backward.default._schema.arguments if a.is_write]
    assert [a.name for a in written] == ["main_grad_VH"]
    assert not written[0].has_default_value()


def test_one_chunk_of_logits_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch):
    alive, most = alive_products(monkeypatch, linear_logprob_module)
    hidden, weight, targets, temperature = drawn(6, 37, dtype=torch.bfloat16)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    found = linear_logprob(*inputs, targets, temperature=temperature.float(), chunk=7)
    gradients(found, inputs)
    assert len(alive) == 12 and max(most) == 1


def test_no_rows_give_no_values_and_gradients_of_zero():
    hidden, weight, targets, temperature = drawn(0, 9)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    found = linear_logprob(*inputs, targets, temperature=temperature)
    assert [x.shape for x in found] == [(0,), (0,)]
    by_hidden, by_weight = gradients(found, inputs)
    assert by_hidden.shape == hidden.shape
    assert torch.equal(by_weight, torch.zeros_like(weight))


def test_a_row_that_is_chosen_twice_has_the_gradient_of_both():
    hidden, weight, _, _ = drawn(3, 9)
    chosen, targets = torch.tensor([2, 0, 2, 2]), torch.tensor([1, 8, 4, 4])
    temperature = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    found = linear_logprob(hidden[chosen], weight, targets, temperature=temperature, chunk=4)
    right = written_out((hidden[chosen], weight, targets, temperature))
    assert_same(gradients(found, inputs), gradients(right, inputs))


def test_more_rows_than_a_grid_has_in_its_second_dimension():
    assert_right(drawn(70_000, 3, 2))


# --- large numbers ---


def of_logits(
    logits: list[list[float]], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Hidden states and weight that have these logits, exactly."""
    return torch.eye(len(logits), dtype=dtype), torch.tensor(logits, dtype=dtype).T.contiguous()


@pytest.mark.parametrize("chunk", [1, 2, 8])
@pytest.mark.parametrize("size", [1.0, 4e4, 1e30])
def test_equal_logits_are_equally_likely_however_large(size: float, chunk: int):
    hidden, weight = of_logits([[size, -size, size, -size], [-size] * 4])
    weight.requires_grad_()
    logprob, entropy = linear_logprob(
        hidden, weight, torch.tensor([2, 1]), temperature=1.0, chunk=chunk
    )
    if size > 1:
        halves, quarters = torch.tensor(0.5).log(), torch.tensor(0.25).log()
        torch.testing.assert_close(logprob.detach(), torch.stack([halves, quarters]))
        torch.testing.assert_close(entropy.detach(), -logprob.detach())
    (by_weight,) = torch.autograd.grad(logprob.sum() + entropy.sum(), weight)
    p = torch.tensor([[size, -size, size, -size], [-size] * 4]).softmax(-1).T
    right = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0]]).T - p
    if size > 1:
        torch.testing.assert_close(by_weight, right)
    assert torch.isfinite(by_weight).all()


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_the_entropy_of_large_logits_keeps_its_digits(chunk: int):
    random = torch.Generator().manual_seed(0)
    logits = (4e4 + torch.randn(8, 64, generator=random)).tolist()
    hidden, weight = of_logits(logits)
    case = hidden, weight, torch.arange(8), torch.ones(8)
    found = linear_logprob(*case[:3], temperature=1.0, chunk=chunk)
    assert_same(found, written_out(case), atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_impossible_tokens_have_no_probability_and_no_gradient(chunk: int):
    """The first three columns overflow: a chunk may have nothing but -inf."""
    hidden = torch.tensor([[1e20, 0.0], [1e20, 1.0]])
    weight = torch.tensor([[-1e20, 1.0]] * 3 + [[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    weight.requires_grad_()
    logprob, entropy = linear_logprob(
        hidden, weight, torch.tensor([4, 5]), temperature=1.0, chunk=chunk
    )
    z = torch.tensor([[0.0, 0, 0], [1, 2, 4]], dtype=torch.float64)
    logp = z.log_softmax(-1)
    assert_same([logprob], [logp[[0, 1], [1, 2]]], atol=1e-6)
    assert_same([entropy], [-(logp.exp() * logp).sum(-1)], atol=1e-6)
    (by_weight,) = torch.autograd.grad(logprob.sum() + entropy.sum(), weight)
    assert torch.equal(by_weight[:3], torch.zeros(3, 2))
    assert torch.isfinite(by_weight).all() and by_weight[3:].abs().max() > 0


def test_an_impossible_target_has_log_prob_minus_infinity_and_a_finite_gradient():
    hidden, weight = torch.tensor([[1e20, 1.0]]), torch.tensor([[-1e20, 0.0], [0.0, 1.0]])
    weight.requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0]), temperature=1.0)
    assert logprob.item() == -torch.inf and entropy.item() == 0.0
    (by_weight,) = torch.autograd.grad(logprob.sum(), weight)
    torch.testing.assert_close(by_weight, torch.tensor([[1e20, 1.0], [-1e20, -1.0]]))


def test_nan_does_not_hide():
    hidden, weight, targets, temperature = drawn(3, 9)
    hidden[1] = float("nan")
    for value in linear_logprob(hidden, weight, targets, temperature=temperature, chunk=4):
        assert value.isnan().tolist() == [False, True, False]


def test_a_target_that_nobody_holds_is_impossible():
    hidden, weight, _, temperature = drawn(2, 9)
    targets = torch.tensor([9, -1])
    logprob, _ = linear_logprob(hidden, weight, targets, temperature=temperature)
    assert logprob.tolist() == [-torch.inf, -torch.inf]


# --- precision ---


def test_fp32_log_probs_of_a_large_vocabulary_are_exact_to_5e_6_nats_in_any_chunks():
    hidden, weight, targets, temperature = drawn(24, 30_011, 896, dtype=torch.float32)
    weight *= 0.08  # what is left is the rounding of the products, in which CPUs differ
    right, entropy = written_out((hidden, weight, targets, temperature.float()))
    for chunk in (1000, 8192, 30_011):
        found = linear_logprob(
            hidden, weight, targets, temperature=temperature.float(), chunk=chunk
        )
        assert_same(found, (right, entropy), atol=5e-6)


def test_bfloat16_inputs_have_fp32_log_probs_and_gradients_of_their_own_dtype():
    case = drawn(12, 3000, 64, dtype=torch.bfloat16)
    hidden, weight = (x.requires_grad_() for x in case[:2])
    found = linear_logprob(hidden, weight, case[2], temperature=case[3].float(), chunk=512)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    right = written_out((*wide, case[2], case[3].float()))
    assert all(x.dtype == torch.float32 for x in found)
    assert_same(found, right, atol=5e-6)
    for one, other in zip(gradients(found, [hidden, weight]), gradients(right, wide), strict=True):
        assert one.dtype == torch.bfloat16
        off = (one.double() - other).abs().max() / other.abs().max()
        assert off < 4e-3  # half a unit in the last place of bfloat16 is 2e-3


def test_two_runs_give_the_same_bits():
    case = drawn(50, 999, 32, dtype=torch.float32)
    runs: list[tuple[Tensor, ...]] = []
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for x in case[:2]]
        found = linear_logprob(*inputs, case[2], temperature=case[3].float(), chunk=100)
        runs.append((*found, *gradients(found, inputs)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))

"""Log-prob and entropy of chosen rows of logits, against float64 written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_srpo.kernels import logprob_stats as module
from megatron_srpo.kernels.logprob_stats import logprob_stats
from tests.unit.head_cases import Chosen, assert_same, chosen_rows, gradients, of_chosen

OP: Any = torch.ops.megatron_srpo.logprob_stats
INF = torch.inf


def assert_right(case: Chosen, **options: Any) -> None:
    """Values and gradient, in float64."""
    logits, *others = case
    logits = logits.detach().requires_grad_()
    found = logprob_stats(logits, *others[:2], temperature=others[2], **options)
    right = of_chosen(logits, *others)
    assert_same(found, right)
    assert_same(gradients(found, [logits]), gradients(right, [logits]))


@pytest.mark.parametrize("vocab", [1, 2, 37, 101])
@pytest.mark.parametrize("chunk", [1, 7, 8192])
def test_values_and_gradient_are_those_written_out_whatever_vocabulary_and_chunk(
    vocab: int, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert_right(chosen_rows(9, 6, vocab))


def test_the_gradient_is_that_of_finite_differences():
    logits, rows, targets, temperature = chosen_rows(4, 5, 7)

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logprob_stats(logits, rows, targets, temperature=temperature)

    assert torch.autograd.gradcheck(both, logits.requires_grad_())


@pytest.mark.parametrize("num_chosen", [0, 5])
def test_the_operation_is_registered_as_torch_wants_it(num_chosen: int):
    logits, *others = chosen_rows(4, num_chosen, 11)
    outcome = torch.library.opcheck(OP, (logits.requires_grad_(), *others, 0, 9, ""))
    assert set(outcome.values()) == {"SUCCESS"}


def test_it_compiles_into_one_graph_forward_and_backward():
    logits, rows, targets, temperature = chosen_rows(4, 5, 11)
    logits.requires_grad_()

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logprob_stats(logits, rows, targets, temperature=temperature)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(disable=False):  # the engines' environment turns it off
        right, found = both(logits), compiled(logits)
    assert_same(found, right)
    assert_same(gradients(found, [logits]), gradients(right, [logits]))


def test_rows_that_are_not_chosen_are_not_looked_at_and_have_no_gradient():
    logits, rows, targets, temperature = chosen_rows(9, 4, 11)
    others = ~torch.isin(torch.arange(9), rows)
    logits[others] = float("nan")
    logits.requires_grad_()
    found = logprob_stats(logits, rows, targets, temperature=temperature)
    (by_logits,) = gradients(found, [logits])
    assert torch.equal(by_logits[others], torch.zeros(int(others.sum()), 11).double())
    assert by_logits[~others].abs().sum(1).min() > 0


def test_a_row_that_is_chosen_twice_has_the_gradient_of_both():
    logits, _, _, temperature = chosen_rows(3, 4, 9)
    assert_right((logits, torch.tensor([2, 0, 2, 2]), torch.tensor([1, 8, 4, 4]), temperature))


def test_no_chosen_rows_give_no_values_and_a_gradient_of_zero():
    logits, rows, targets, temperature = chosen_rows(3, 0, 9)
    found = logprob_stats(logits.requires_grad_(), rows, targets, temperature=temperature)
    assert [x.shape for x in found] == [(0,), (0,)]
    assert torch.equal(*gradients(found, [logits]), torch.zeros(3, 9).double())


def test_columns_that_are_no_tokens_have_no_part_in_it():
    logits, rows, targets, temperature = chosen_rows(6, 5, 20)
    padded = logits.clone()
    padded[:, 13:] = float("nan")
    padded.requires_grad_()
    found = logprob_stats(padded, rows, targets % 13, temperature=temperature, num_real=13)
    assert_same(found, of_chosen(logits[:, :13], rows, targets % 13, temperature))
    (by_logits,) = gradients(found, [padded])
    assert torch.equal(by_logits[:, 13:], torch.zeros(6, 7).double())
    assert by_logits[rows, :13].abs().min() > 0


def test_the_first_column_may_be_any_token():
    logits, rows, targets, temperature = chosen_rows(6, 5, 20)
    found = logprob_stats(logits, rows, targets + 7, temperature=temperature, first_id=7)
    assert_same(found, of_chosen(logits, rows, targets, temperature))


@pytest.mark.parametrize("size", [4e4, 1e30])
def test_equal_logits_are_equally_likely_however_large(size: float):
    logits = torch.tensor([[size, -size, size, -size], [-size] * 4], requires_grad=True)
    rows, targets = torch.tensor([0, 1]), torch.tensor([2, 1])
    logprob, entropy = logprob_stats(logits, rows, targets, temperature=1.0)
    halves, quarters = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    torch.testing.assert_close(logprob.detach(), torch.stack([halves, quarters]))
    torch.testing.assert_close(entropy.detach(), -logprob.detach())
    (by_logits,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
    right = [[-0.5, 0.0, 0.5, 0.0], [-0.25, 0.75, -0.25, -0.25]]
    torch.testing.assert_close(by_logits, torch.tensor(right))


def test_impossible_tokens_have_no_gradient_and_an_impossible_target_a_finite_one():
    logits = torch.tensor([[-INF, -INF, 0.0, 1.0]] * 2, requires_grad=True)
    found = logprob_stats(logits, torch.tensor([0, 1]), torch.tensor([2, 0]), temperature=1.0)
    assert found[0][1].item() == -INF
    (by_logits,) = torch.autograd.grad(found[0].sum() + found[1].sum(), logits)
    assert torch.isfinite(by_logits).all()
    assert by_logits[0, :2].tolist() == [0.0, 0.0] and by_logits[1, 0].item() == 1.0


def test_more_rows_than_a_grid_has_in_its_second_dimension():
    assert_right(chosen_rows(70_000, 70_001, 3))


def test_offsets_of_logits_may_need_more_than_32_bits():
    """Two rows so far apart; the memory between them is never touched."""
    far = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((2, 8), (2**31, 1))
    logits, rows, targets, temperature = chosen_rows(2, 2, 8)
    far.copy_(logits).requires_grad_()
    near = far.detach().clone().double().requires_grad_()
    found = logprob_stats(far, rows, targets, temperature=temperature)
    right = of_chosen(near, rows, targets, temperature)
    assert_same(found, right, atol=1e-5)
    assert_same(gradients(found, [far]), gradients(right, [near]), atol=1e-3)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_log_probs_of_a_large_vocabulary_are_exact_to_5e_6_nats(
    dtype: torch.dtype, rounding: float
):
    logits, rows, targets, temperature = chosen_rows(12, 10, 30_011)
    logits = (3 * logits).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    found = logprob_stats(logits, rows, targets, temperature=temperature)
    right = of_chosen(exact, rows, targets, temperature.float().double())
    assert_same(found, right, atol=5e-6)
    (by_logits,), (wide,) = gradients(found, [logits]), gradients(right, [exact])
    assert by_logits.dtype == dtype
    assert (by_logits.double() - wide).abs().max() < rounding * wide.abs().max()


def test_two_runs_give_the_same_bits():
    logits, rows, targets, temperature = chosen_rows(50, 80, 999)
    runs: list[tuple[Tensor, ...]] = []
    for _ in range(2):
        own = logits.float().requires_grad_()
        found = logprob_stats(own, rows, targets, temperature=temperature)
        runs.append((*found, *gradients(found, [own])))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))

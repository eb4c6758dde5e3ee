"""What GPUs run of the operations, in Triton's interpreter, against what CPUs run.

Like `interpreted_rows.py`, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_srpo import loss as formulas
from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels import (
    group_advantage_triton,
    logprob_stats_triton,
    policy_loss_triton,
    rows,
    rows_triton,
)
from megatron_srpo.kernels.group_advantage import Baseline, Std
from megatron_srpo.kernels.policy_loss import TOTALS, arguments, counters
from megatron_srpo.loss import Counters, TokenTensors
from tests.unit import test_loss
from tests.unit.advantage_cases import GROUPS, by_the_loop, flat
from tests.unit.head_cases import Chosen, chosen_rows, gradients, of_chosen
from tests.unit.loss_cases import LOSSES, assert_same_counters, in_fp32, nothing

INF = torch.inf


# --- rows of logits ---


def interpreted(case: Chosen, num_real: int, shards: Sequence[int]) -> tuple[Tensor, ...]:
    """Log-prob, entropy, and the gradient of `head_cases.gradients`; columns are divided as if
    ranks had them."""
    logits, chosen, targets, temperature = case
    temperature = temperature.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    parts: list[Tensor] = []
    first = 0
    for width, piece in zip(shards, logits.split(list(shards), 1), strict=True):
        stats = rows.nothing_seen(len(chosen), like=temperature)
        real = piece[:, : max(num_real - first, 0)]
        if real.shape[1]:
            rows_triton.absorb_chosen(stats, real, chosen, targets - first, temperature)
        parts.append(stats)
        first += width
    logprob, entropy, softmax = rows_triton.concluded(torch.stack(parts), temperature)
    factor = torch.linspace(-1, 2, len(chosen), dtype=softmax.dtype)
    by_output = torch.stack([factor, factor.cos()])
    by_logits = logprob_stats_triton.gradients(
        logits, chosen, targets, temperature, softmax, by_output, num_real
    )
    return logprob, entropy, by_logits


def assert_right(case: Chosen, num_real: int, shards: Sequence[int], atol: float) -> None:
    logits, chosen, targets, temperature = case
    # Impossible, but finite: autograd's 0 x inf is NaN.
    exact = logits.double().clamp(min=-1e35).requires_grad_()
    right = of_chosen(exact[:, :num_real], chosen, targets, temperature.float().double())
    found = interpreted(case, num_real, shards)
    for one, other in zip(found, (*right, *gradients(right, [exact])), strict=True):
        torch.testing.assert_close(one.double(), other.detach(), rtol=atol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("vocab", "num_real", "shards"),
    [(1, 1, [1]), (37, 30, [37]), (1024, 1024, [700, 324]), (2500, 2400, [1030, 1030, 440])],
)
def test_log_probs_entropies_and_gradients_of_chosen_rows(
    vocab: int, num_real: int, shards: list[int], dtype: torch.dtype
):
    logits, chosen, targets, temperature = chosen_rows(5, 4, vocab)
    case = logits.to(dtype), chosen, targets % num_real, temperature
    assert_right(case, num_real, shards, atol=5e-6 if dtype == torch.float32 else 2e-3)


def test_bfloat16_logits_are_read_and_their_gradient_rounded_once():
    logits, *others = chosen_rows(5, 4, 37)
    assert_right((logits.bfloat16(), *others), 37, [37], atol=8e-3)


def test_extreme_logits_and_a_row_chosen_twice():
    logits = torch.tensor(
        [
            [-INF, -INF, -INF, 1.0, 2.0, 3.0],
            [1.0, -INF, 2.0, -INF, -INF, -INF],
            [1e30, -1e30, 1e30, 0.0, 1.0, -3e38],
            [4e4, 4e4 + 1, 4e4 - 1, 4e4, 0.0, -4e4],
        ]
    )
    chosen, targets = torch.tensor([3, 0, 1, 3, 2]), torch.tensor([1, 5, 2, 0, 2])
    for shards in ([6], [3, 3], [1, 5]):
        assert_right((logits, chosen, targets, torch.ones(5)), 6, shards, atol=2e-6)


def test_rows_of_which_nothing_is_chosen_are_not_read():
    logits = torch.full((3, 7), float("nan"))
    logits[1] = torch.arange(7.0)
    case = logits, torch.tensor([1]), torch.tensor([6]), torch.ones(1)
    logprob, _, by_logits = interpreted(case, 7, [7])
    assert torch.equal(by_logits[[0, 2]], torch.zeros(2, 7)) and torch.isfinite(logprob).all()
    nothing_chosen = logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0)
    assert torch.equal(interpreted(nothing_chosen, 7, [7])[2], torch.zeros(3, 7))


def test_offsets_of_logits_may_need_more_than_32_bits(monkeypatch: pytest.MonkeyPatch):
    """Rows so far apart, by a stride of 31 bits; the memory between them is never touched. The
    interpreter would copy it all to itself."""
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source: None)
    far = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((3, 8), (2**30, 1))
    logits, *others = chosen_rows(3, 2, 8)
    others[0] = torch.tensor([2, 0])
    far.copy_(logits)
    near = far.clone(memory_format=torch.contiguous_format)
    for one, other in zip(
        interpreted((far, *others), 8, [8]), interpreted((near, *others), 8, [8]), strict=True
    ):
        assert torch.equal(one, other)


# --- loss ---


def by_operation(
    logprobs: Tensor, tokens: TokenTensors, cfg: LossConfig
) -> tuple[Tensor, Tensor, Counters]:
    totals = torch.full((len(TOTALS),), float("nan"), dtype=torch.float64)
    case: Any = arguments(tokens, cfg, 3.0)
    return *policy_loss_triton.policy_loss(totals, logprobs, *case), counters(totals, cfg)


def by_formulas(
    logprobs: Tensor, tokens: TokenTensors, cfg: LossConfig
) -> tuple[Tensor, Tensor, Counters]:
    logprobs = logprobs.clone().requires_grad_()
    loss, counted = formulas.policy_loss(logprobs, tokens, cfg, denominator=3.0)
    return loss.detach(), *torch.autograd.grad(loss, logprobs), counted


@pytest.mark.parametrize("cfg", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("lengths", [[1], [9, 6, 5], [2000, 100]], ids=str)
def test_loss_slopes_and_counters_are_those_of_the_formulas(cfg: LossConfig, lengths: list[int]):
    logprobs, tokens = test_loss.drawn(3, lengths)
    right = by_formulas(logprobs, tokens, cfg)
    if "sequence" in cfg.importance:
        assert right[2].quotients["importance/capped_rate"][0] < sum(lengths)
    for found, rel in (
        # The series of k3 ends at 1e-9, and Triton 3.6 holds the bounds of the clip in fp32.
        (by_operation(logprobs, tokens, cfg), 1e-8),
        (by_operation(logprobs.float(), in_fp32(tokens), cfg), 2e-5),
    ):
        assert found[1].dtype == found[0].dtype
        for one, other in zip(found[:2], right[:2], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=rel, atol=rel)
        assert_same_counters(found[2], right[2], rel=rel)


def test_differences_that_are_small_keep_their_digits_in_k3():
    reference = torch.tensor([1e-4, -3e-5])
    loss, _, _ = by_operation(torch.zeros(2), _against(reference), LossConfig(kl_coef=3.0))
    right = (reference.double().expm1() - reference.double()).sum()
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)


def _against(reference: Tensor) -> TokenTensors:
    ones, zeros = torch.ones_like(reference), torch.zeros_like(reference)
    return TokenTensors(
        loss_weight_T=ones,
        advantage_T=zeros,
        rollout_T=zeros,
        old_T=None,
        reference_T=reference,
        cu_seqlens=torch.tensor([0, len(reference)]),
    )


def test_nan_does_not_hide():
    logprobs, tokens = test_loss.drawn(3, [3000])
    logprobs[2500] = float("nan")
    assert tokens.loss_weight_T[2500] == 0  # not trained: neither way does it matter to counters
    logprobs[2501] = float("nan")
    cfg = LOSSES["ppo"]
    found, right = (f(logprobs, tokens, cfg) for f in (by_operation, by_formulas))
    for name, (total, _) in right[2].quotients.items():
        assert found[2].quotients[name][0].isnan() == total.isnan(), name
    for name, value in right[2].maxima.items():
        assert found[2].maxima[name].isnan() == value.isnan(), name
    assert found[2].maxima["loss/ratio_max"].isnan()


def test_no_tokens_have_no_loss():
    logprobs, tokens = nothing(test_loss.drawn(3, [4])[1])
    loss, slope, counted = by_operation(logprobs, tokens, LOSSES["everything"])
    assert loss == 0 and slope.shape == (0,)
    assert_same_counters(counted, by_formulas(logprobs, tokens, LOSSES["everything"])[2], rel=0)


def test_two_runs_give_the_same_bits():
    logprobs, tokens = test_loss.drawn(3, [3000])
    one, other = (by_operation(logprobs, tokens, LOSSES["sequence_mask"]) for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert_same_counters(one[2], other[2], rel=0)


# --- advantages ---


@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("std", get_args(Std))
def test_advantages_are_those_of_the_loop(baseline: Baseline, std: Std):
    found = group_advantage_triton.group_advantage(*flat(GROUPS), baseline, std)
    right = torch.tensor(by_the_loop(GROUPS, baseline=baseline, std=std))
    torch.testing.assert_close(found, right, rtol=2e-7, atol=1e-9)
    agree = by_the_loop(GROUPS[:2], baseline=baseline, std=std)[4:]
    assert found[4:11].tolist() == agree == [0.0] * 7


def test_no_groups_have_no_advantages():
    found = group_advantage_triton.group_advantage(*flat([]), "mean", "sample")
    assert found.shape == (0,)

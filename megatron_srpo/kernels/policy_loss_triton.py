"""Loss, gradient and counters of a micro-batch's tokens on a GPU: one launch of two programs.

Tokens are few (some hundred kilobytes), so what counts is the launch. One program makes the loss,
one compares trainer and rollout engine; in each, a lane adds up every BLOCK-th token, then the
lanes are added: in one order, without atomics, and two runs give the same bits. Importance weights
of whole responses take a launch before it, a program a response. Formulas are those of `loss.py`,
in the dtype of the log-probs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(2048)
SEQUENCE_BLOCK = tl.constexpr(1024)


def policy_loss(
    totals_K: Tensor,
    logprobs_T: Tensor,
    loss_weight_T: Tensor,
    advantage_T: Tensor,
    rollout_T: Tensor,
    old_T: Tensor | None,
    reference_T: Tensor | None,
    cu_seqlens: Tensor,
    surrogate: str,
    importance: str,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    importance_cap: float,
    denominator: float,
) -> tuple[Tensor, Tensor]:
    """L and its slopes; fills `totals_K`. Everything as in the operation in `policy_loss.py`."""
    slope_T = torch.empty_like(logprobs_T)
    loss = logprobs_T.new_empty(())
    log_weight_T = None
    if importance.startswith("sequence"):
        log_weight_T = torch.empty_like(logprobs_T)
        _sequence_log_weights[(len(cu_seqlens) - 1,)](
            log_weight_T, logprobs_T, loss_weight_T, rollout_T, old_T, cu_seqlens
        )
    two_programs: Any = _policy_loss[(2,)]
    two_programs(
        loss,
        slope_T,
        totals_K,
        logprobs_T,
        loss_weight_T,
        advantage_T,
        rollout_T,
        old_T,
        reference_T,
        log_weight_T,
        len(logprobs_T),
        math.log1p(-clip_low),
        math.log1p(clip_high),
        kl_coef,
        importance_cap,
        denominator,
        HAS_RATIO=surrogate == "ppo",
        IS_WEIGHTED=importance != "none",
        IS_TRUNCATED=importance.endswith("truncate"),
        num_warps=16,
    )
    return loss, slope_T


@triton.jit
def _k3(d):
    """exp(d) - 1 - d, without its cancellation where d is small."""
    series = d * (1 / 5040 + d * (1 / 40320 + d * (1 / 362880 + d * (1 / 3628800))))
    series = d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + series))))
    return tl.where(tl.abs(d) < 0.35, d * d * (0.5 + series), tl.exp(d) - 1.0 - d)


@triton.jit
def _sampled(loss_weight, rollout):
    """Trained, and sampled by somebody: only a demonstration's log-prob is NaN."""
    return (loss_weight != 0) & (rollout == rollout)


@triton.jit
def _others(pointer, place, is_here, is_sampled, current):
    """What another policy said, the present one's own where nothing was sampled."""
    said = current  # a return from within the branch would not keep what follows from compiling
    if pointer is not None:
        said = tl.load(pointer + place, mask=is_here, other=0.0)
        said = tl.where(is_sampled, said, current)
    return said


@triton.jit
def _sequence_log_weights(
    out_ptr, logprob_ptr, loss_weight_ptr, rollout_ptr, old_ptr, cu_seqlens_ptr
):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    total = tl.zeros((SEQUENCE_BLOCK,), out_ptr.dtype.element_ty)
    for first in range(start, end, SEQUENCE_BLOCK):
        place = first + tl.arange(0, SEQUENCE_BLOCK)
        is_here = place < end
        current = tl.load(logprob_ptr + place, mask=is_here, other=0.0)
        loss_weight = tl.load(loss_weight_ptr + place, mask=is_here, other=0.0)
        rollout = tl.load(rollout_ptr + place, mask=is_here, other=0.0)
        is_sampled = _sampled(loss_weight, rollout)
        old = _others(old_ptr, place, is_here, is_sampled, current)
        total += tl.where(is_sampled, old - rollout, 0.0)
    log_weight = tl.sum(total, 0)
    for first in range(start, end, SEQUENCE_BLOCK):
        place = first + tl.arange(0, SEQUENCE_BLOCK)
        tl.store(out_ptr + place, log_weight, mask=place < end)


@triton.jit
def _policy_loss(
    loss_ptr,
    slope_ptr,
    totals_ptr,
    logprob_ptr,
    loss_weight_ptr,
    advantage_ptr,
    rollout_ptr,
    old_ptr,
    reference_ptr,
    log_weight_ptr,
    num_tokens,
    log_low,
    log_high,
    kl_coef,
    importance_cap,
    denominator,
    HAS_RATIO: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    IS_TRUNCATED: tl.constexpr,
):
    if tl.program_id(0) == 0:
        _loss(
            loss_ptr, slope_ptr, totals_ptr, logprob_ptr, loss_weight_ptr, advantage_ptr,
            rollout_ptr, old_ptr, reference_ptr, log_weight_ptr, num_tokens, log_low, log_high,
            kl_coef, importance_cap, denominator, HAS_RATIO, IS_WEIGHTED, IS_TRUNCATED,
        )  # fmt: skip
    else:
        _mismatch(totals_ptr, logprob_ptr, loss_weight_ptr, rollout_ptr, old_ptr, num_tokens)


@triton.jit
def _loss(
    loss_ptr, slope_ptr, totals_ptr, logprob_ptr, loss_weight_ptr, advantage_ptr,
    rollout_ptr, old_ptr, reference_ptr, log_weight_ptr, num_tokens, log_low, log_high,
    kl_coef, importance_cap, denominator,
    HAS_RATIO: tl.constexpr, IS_WEIGHTED: tl.constexpr, IS_TRUNCATED: tl.constexpr,
):  # fmt: skip
    loss_sum = tl.zeros((BLOCK,), slope_ptr.dtype.element_ty)
    shown_sum, clipped_sum, used_sum = loss_sum, loss_sum, loss_sum
    capped_sum, reference_sum, ratio_max = loss_sum, loss_sum, loss_sum
    for first in range(0, num_tokens, BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_here = place < num_tokens
        current = tl.load(logprob_ptr + place, mask=is_here, other=0.0)
        loss_weight = tl.load(loss_weight_ptr + place, mask=is_here, other=0.0)
        advantage = tl.load(advantage_ptr + place, mask=is_here, other=0.0)
        rollout = tl.load(rollout_ptr + place, mask=is_here, other=0.0)
        is_sampled = _sampled(loss_weight, rollout)
        is_shown = rollout != rollout
        old = _others(old_ptr, place, is_here, is_sampled, current)
        score, steepness, bites = _surrogate(
            current, current - old, advantage, is_shown, log_low, log_high, HAS_RATIO
        )
        credit = loss_weight * advantage
        if IS_WEIGHTED:
            log_weight = tl.where(is_sampled, old - rollout, 0.0)
            if log_weight_ptr is not None:
                log_weight = tl.load(log_weight_ptr + place, mask=is_here, other=0.0)
            weight = tl.exp(log_weight)
            is_over = is_sampled & (weight > importance_cap)
            weight = tl.where(is_over, importance_cap if IS_TRUNCATED else 0.0, weight)
            credit = tl.where(is_sampled, credit * weight, credit)
            used_sum += tl.where(is_sampled, weight, 0.0)
            capped_sum += tl.where(is_over, 1.0, 0.0)
        loss = -(credit * score)
        slope = -(credit * steepness)
        if reference_ptr is not None:
            d = _others(reference_ptr, place, is_here, is_sampled, current) - current
            k3 = _k3(d)
            loss += kl_coef * loss_weight * k3
            slope -= kl_coef * loss_weight * (d + k3)
            reference_sum += tl.where(is_sampled, k3, 0.0)
        tl.store(slope_ptr + place, slope / denominator, mask=is_here)
        loss_sum += loss
        shown_sum += tl.where(is_shown, loss, 0.0)
        clipped_sum += tl.where(is_sampled & bites, 1.0, 0.0)
        ratio_max = _larger(ratio_max, tl.where(is_sampled, tl.exp(current - old), 0.0))
    tl.store(loss_ptr, tl.sum(loss_sum, 0) / denominator)
    tl.store(totals_ptr, tl.sum(loss_sum, 0) / denominator)
    tl.store(totals_ptr + 1, tl.sum(shown_sum, 0) / denominator)
    tl.store(totals_ptr + 8, tl.sum(clipped_sum, 0))
    tl.store(totals_ptr + 9, tl.sum(used_sum, 0))
    tl.store(totals_ptr + 10, tl.sum(capped_sum, 0))
    tl.store(totals_ptr + 11, tl.sum(reference_sum, 0))
    tl.store(totals_ptr + 13, _largest(ratio_max))


@triton.jit
def _surrogate(current, log_ratio, advantage, is_shown, log_low, log_high, HAS_RATIO: tl.constexpr):
    """What the credit multiplies, its slope, and where the clip bites."""
    bites = advantage != advantage
    score = current
    steepness = tl.full((BLOCK,), 1.0, current.dtype)
    if HAS_RATIO:
        too_likely = (advantage > 0) & (log_ratio > log_high)
        bites = too_likely | ((advantage < 0) & (log_ratio < log_low))
        bound = tl.minimum(tl.maximum(log_ratio, log_low), log_high)
        ratio = tl.exp(tl.where(bites, bound, log_ratio))
        score = tl.where(is_shown, current, ratio)
        steepness = tl.where(bites, 0.0, ratio)
    return score, steepness, bites


@triton.jit
def _mismatch(totals_ptr, logprob_ptr, loss_weight_ptr, rollout_ptr, old_ptr, num_tokens):
    count_sum = tl.zeros((BLOCK,), logprob_ptr.dtype.element_ty)
    abs_sum, k1_sum, k3_sum = count_sum, count_sum, count_sum
    weight_sum, square_sum, abs_max = count_sum, count_sum, count_sum
    for first in range(0, num_tokens, BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_here = place < num_tokens
        current = tl.load(logprob_ptr + place, mask=is_here, other=0.0)
        loss_weight = tl.load(loss_weight_ptr + place, mask=is_here, other=0.0)
        rollout = tl.load(rollout_ptr + place, mask=is_here, other=0.0)
        is_sampled = _sampled(loss_weight, rollout)
        old = _others(old_ptr, place, is_here, is_sampled, current)
        off = tl.where(is_sampled, old - rollout, 0.0)
        weight = tl.where(is_sampled, tl.exp(off), 0.0)
        count_sum += tl.where(is_sampled, 1.0, 0.0)
        abs_sum += tl.abs(off)
        k1_sum -= off
        k3_sum += _k3(off)
        weight_sum += weight
        square_sum += weight * weight
        abs_max = _larger(abs_max, tl.abs(off))
    tl.store(totals_ptr + 2, tl.sum(count_sum, 0))
    tl.store(totals_ptr + 3, tl.sum(abs_sum, 0))
    tl.store(totals_ptr + 4, tl.sum(k1_sum, 0))
    tl.store(totals_ptr + 5, tl.sum(k3_sum, 0))
    tl.store(totals_ptr + 6, tl.sum(weight_sum, 0))
    tl.store(totals_ptr + 7, tl.sum(square_sum, 0))
    tl.store(totals_ptr + 12, _largest(abs_max))
    tl.store(totals_ptr + 14, 0.0)


@triton.jit
def _larger(one, other):
    """NaN if either is: a comparison with NaN is false."""
    return tl.where((other > one) | (other != other), other, one)


@triton.jit
def _largest(lanes):
    """Of numbers that are not negative; NaN if one is."""
    is_nan = lanes != lanes
    return tl.sum(tl.where(is_nan, lanes, 0.0), 0) + tl.max(tl.where(is_nan, 0.0, lanes), 0)

"""The functions of `rows.py` on a GPU: each reads a chunk of logits once.

A program has a row (the first grid dimension, which may be long), or a row's block of columns.
Differences are taken before they are divided by the temperature, and are exponents of 2. Offsets
are 64 bit: a chunk may have more than 2^31 logits. Sums are ordered, there are no atomics: two runs
give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = tl.constexpr(1024)
DEPTH = tl.constexpr(4)
"""Columns that a lane meets at once: one maximum and one shift for all of them."""
GRADIENT_BLOCK = tl.constexpr(4096)
GRADIENT_WARPS = 4
ROWS = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEGLIGIBLE = tl.constexpr(-1000.0)
LOWEST = tl.constexpr(-3.0e38)


def absorb(stats_4N: Tensor, logits_NC: Tensor, targets_N: Tensor, temperature_N: Tensor) -> None:
    """As `rows.absorb`."""
    absorb_chosen(stats_4N, logits_NC, None, targets_N, temperature_N)


def absorb_chosen(
    stats_4N: Tensor,
    logits_TC: Tensor,
    rows_N: Tensor | None,
    targets_N: Tensor,
    temperature_N: Tensor,
) -> None:
    """Of these rows of logits of any dtype, whose columns lie side by side; None: of all."""
    num_rows, num_columns = len(targets_N), logits_TC.shape[1]
    assert logits_TC.stride(1) == 1 or num_columns < 2, "columns of logits lie apart"
    if num_rows:
        _absorb[(num_rows,)](
            stats_4N,
            logits_TC,
            rows_N,
            targets_N,
            temperature_N,
            num_rows,
            num_columns,
            logits_TC.stride(0),
        )


def gradients(
    logits_NC: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    softmax_3N: Tensor,
    by_output_2N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As `rows.gradients`; leaves `logits_NC` as it is unless that is of `dtype`."""
    num_rows, num_columns = logits_NC.shape
    out_NC = logits_NC if logits_NC.dtype == dtype else torch.empty_like(logits_NC, dtype=dtype)
    if num_rows:
        launch: Any = _gradients[(num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK.value))]
        launch(
            out_NC,
            logits_NC,
            targets_N,
            temperature_N,
            softmax_3N,
            by_output_2N,
            num_rows,
            num_columns,
            num_warps=GRADIENT_WARPS,
        )
    return out_NC


def concluded(parts: Tensor, temperature_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `rows.concluded`, in one launch."""
    num_parts, _, num_rows = parts.shape
    assert parts.is_contiguous(), "statistics lie apart"
    logprob_N, entropy_N = parts.new_empty(num_rows), parts.new_empty(num_rows)
    softmax_3N = parts.new_empty(3, num_rows)
    if num_rows:
        _concluded[(triton.cdiv(num_rows, ROWS.value),)](
            logprob_N, entropy_N, softmax_3N, parts, temperature_N, num_parts, num_rows
        )
    return logprob_N, entropy_N, softmax_3N


@triton.jit
def _finite(largest):
    """Any very low number in the place of -inf."""
    return tl.where(largest < LOWEST, LOWEST, largest)


@triton.jit
def _cut(exponent):
    """So that 0 times it is 0. NaN may get lost here: what it is multiplied with has it."""
    return tl.maximum(exponent, NEGLIGIBLE)


@triton.jit
def by_logits(logits, is_target, temperature, largest, log_sum, entropy, by_logprob, by_entropy):
    """d loss / d logits of a row's columns; arguments as in `rows.gradients`."""
    per_temperature = 1.0 / temperature
    by_target = by_logprob * per_temperature
    by_exponent = -by_entropy * per_temperature * LN_2
    constant = -(by_logprob + by_entropy * (entropy - log_sum)) * per_temperature
    exponent = (logits - _finite(largest)) * (per_temperature * LOG2_E)
    p = tl.exp2(exponent - log_sum * LOG2_E)
    return p * (by_exponent * _cut(exponent) + constant) + tl.where(is_target, by_target, 0.0)


@triton.jit
def _absorb(
    stats_ptr,
    logits_ptr,
    rows_ptr,
    targets_ptr,
    temperature_ptr,
    num_rows,
    num_columns,
    row_stride,
):
    row = tl.program_id(0).to(tl.int64)
    source = row
    if rows_ptr is not None:
        source = tl.load(rows_ptr + row).to(tl.int64)
    logits_ptr += source * row_stride
    dtype = stats_ptr.dtype.element_ty
    to_exponent = (1.0 / tl.load(temperature_ptr + row)) * LOG2_E
    # A lane has every LANES-th column, and statistics of its own until the end; u and shifts are
    # exponents of 2.
    lanes = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full((LANES,), float("-inf"), dtype)
    s = tl.zeros((LANES,), dtype)
    u = tl.zeros((LANES,), dtype)
    for start in range(0, num_columns, DEPTH * LANES):
        column = start + lanes
        x = tl.load(logits_ptr + column, mask=column < num_columns, other=float("-inf"))
        x = x.to(dtype)
        largest = tl.maximum(m, tl.max(x, 0))
        finite = _finite(largest)
        shift = _cut((m - finite) * to_exponent)
        kept = tl.exp2(shift)
        exponent = (x - finite[None, :]) * to_exponent
        weight = tl.exp2(exponent)
        u = kept * (u + shift * s) + tl.sum(weight * _cut(exponent), 0)
        s = kept * s + tl.sum(weight, 0)
        m = largest

    m_ptr = stats_ptr + row
    s_ptr = m_ptr + num_rows
    u_ptr = s_ptr + num_rows
    t_ptr = u_ptr + num_rows
    m_before = tl.load(m_ptr)
    s_before = tl.load(s_ptr)
    largest = tl.maximum(tl.max(m, 0), m_before)
    finite = _finite(largest)
    shift = _cut((m - finite) * to_exponent)
    shift_before = _cut((m_before - finite) * to_exponent)
    kept = tl.exp2(shift)
    kept_before = tl.exp2(shift_before)
    u_before = kept_before * (tl.load(u_ptr) + shift_before * LN_2 * s_before)
    tl.store(m_ptr, largest)
    tl.store(s_ptr, kept_before * s_before + tl.sum(kept * s, 0))
    tl.store(u_ptr, u_before + tl.sum(kept * (u + shift * s), 0) * LN_2)

    target = tl.load(targets_ptr + row)
    if (target >= 0) & (target < num_columns):
        tl.store(t_ptr, tl.load(logits_ptr + target).to(dtype))


@triton.jit
def _concluded(
    logprob_ptr, entropy_ptr, softmax_ptr, parts_ptr, temperature_ptr, num_parts, num_rows
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    temperature = tl.load(temperature_ptr + row, mask=is_row, other=1.0).to(tl.float64)
    largest = tl.full((ROWS,), float("-inf"), tl.float64)
    t = tl.full((ROWS,), float("-inf"), tl.float64)
    for part in range(num_parts):
        m_ptr = parts_ptr + 4 * part * num_rows + row
        largest = tl.maximum(largest, tl.load(m_ptr, mask=is_row, other=0.0).to(tl.float64))
        t_part = tl.load(m_ptr + 3 * num_rows, mask=is_row, other=0.0).to(tl.float64)
        t = tl.where((t_part > t) | (t_part != t_part), t_part, t)
    s = tl.zeros((ROWS,), tl.float64)
    u = tl.zeros((ROWS,), tl.float64)
    for part in range(num_parts):
        m_ptr = parts_ptr + 4 * part * num_rows + row
        m_part = tl.load(m_ptr, mask=is_row, other=0.0).to(tl.float64)
        s_part = tl.load(m_ptr + num_rows, mask=is_row, other=1.0).to(tl.float64)
        u_part = tl.load(m_ptr + 2 * num_rows, mask=is_row, other=0.0).to(tl.float64)
        shift = _cut((m_part - _finite(largest)) / temperature)
        kept = tl.exp(shift)
        s += kept * s_part
        u += kept * (u_part + shift * s_part)
    log_sum = tl.log(s)
    entropy = log_sum - u / s
    tl.store(logprob_ptr + row, (t - largest) / temperature - log_sum, mask=is_row)
    tl.store(entropy_ptr + row, entropy, mask=is_row)
    tl.store(softmax_ptr + row, largest, mask=is_row)
    tl.store(softmax_ptr + num_rows + row, log_sum, mask=is_row)
    tl.store(softmax_ptr + 2 * num_rows + row, entropy, mask=is_row)


@triton.jit
def _gradients(
    out_ptr,
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    softmax_ptr,
    by_output_ptr,
    num_rows,
    num_columns,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * GRADIENT_BLOCK + tl.arange(0, GRADIENT_BLOCK)
    is_real = column < num_columns
    found = by_logits(
        tl.load(logits_ptr + row * num_columns + column, mask=is_real, other=0.0),
        column == tl.load(targets_ptr + row),
        tl.load(temperature_ptr + row),
        tl.load(softmax_ptr + row),
        tl.load(softmax_ptr + num_rows + row),
        tl.load(softmax_ptr + 2 * num_rows + row),
        tl.load(by_output_ptr + row),
        tl.load(by_output_ptr + num_rows + row),
    )
    out = found.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_columns + column, out, mask=is_real)

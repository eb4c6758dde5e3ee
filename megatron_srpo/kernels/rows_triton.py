"""The functions of `rows.py` on a GPU: each reads a chunk of logits once.

A program has a row (the first grid dimension, which may be long), or a row's block of columns.
Offsets are 64 bit: a chunk may have more than 2^31 logits. Sums are ordered, there are no atomics:
two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(1024)
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
        _gradients[(num_rows, triton.cdiv(num_columns, BLOCK.value))](
            out_NC,
            logits_NC,
            targets_N,
            temperature_N,
            softmax_3N,
            by_output_2N,
            num_rows,
            num_columns,
        )
    return out_NC


@triton.jit
def _relative(z, largest):
    """z - largest, between NEGLIGIBLE and 0. A comparison with NaN is false: NaN stays."""
    difference = z - tl.where(largest < LOWEST, LOWEST, largest)
    return tl.where(difference < NEGLIGIBLE, NEGLIGIBLE, difference)


@triton.jit
def by_z(z, is_target, largest, log_sum, entropy, by_logprob, by_entropy):
    """d loss / d z of a row's columns; arguments as in `rows.gradients`."""
    logp = _relative(z, largest) - log_sum
    found = -tl.exp(logp) * (by_logprob + by_entropy * (logp + entropy))
    return found + tl.where(is_target, by_logprob, 0.0)


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
    temperature = tl.load(temperature_ptr + row)
    dtype = stats_ptr.dtype.element_ty
    # A lane has every BLOCK-th column, and statistics of its own until the end.
    m = tl.full((BLOCK,), float("-inf"), dtype)
    s = tl.zeros((BLOCK,), dtype)
    u = tl.zeros((BLOCK,), dtype)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + column, mask=column < num_columns, other=float("-inf"))
        z = z.to(dtype) / temperature
        largest = tl.maximum(m, z)
        shift = _relative(m, largest)
        difference = _relative(z, largest)
        kept = tl.exp(shift)
        weight = tl.exp(difference)
        u = kept * (u + shift * s) + weight * difference
        s = kept * s + weight
        m = largest

    m_ptr = stats_ptr + row
    s_ptr = m_ptr + num_rows
    u_ptr = s_ptr + num_rows
    t_ptr = u_ptr + num_rows
    m_before = tl.load(m_ptr)
    s_before = tl.load(s_ptr)
    largest = tl.maximum(tl.max(m, 0), m_before)
    shift = _relative(m, largest)
    shift_before = _relative(m_before, largest)
    kept = tl.exp(shift)
    kept_before = tl.exp(shift_before)
    u_before = kept_before * (tl.load(u_ptr) + shift_before * s_before)
    tl.store(m_ptr, largest)
    tl.store(s_ptr, kept_before * s_before + tl.sum(kept * s, 0))
    tl.store(u_ptr, u_before + tl.sum(kept * (u + shift * s), 0))

    target = tl.load(targets_ptr + row)
    if (target >= 0) & (target < num_columns):
        tl.store(t_ptr, tl.load(logits_ptr + target).to(dtype) / temperature)


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
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = column < num_columns
    temperature = tl.load(temperature_ptr + row)
    largest = tl.load(softmax_ptr + row)
    log_sum = tl.load(softmax_ptr + num_rows + row)
    entropy = tl.load(softmax_ptr + 2 * num_rows + row)
    by_logprob = tl.load(by_output_ptr + row)
    by_entropy = tl.load(by_output_ptr + num_rows + row)

    z = tl.load(logits_ptr + row * num_columns + column, mask=is_real, other=0.0) / temperature
    is_target = column == tl.load(targets_ptr + row)
    found = by_z(z, is_target, largest, log_sum, entropy, by_logprob, by_entropy)
    out = (found / temperature).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_columns + column, out, mask=is_real)

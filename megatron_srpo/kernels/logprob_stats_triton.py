"""The gradient of logits of which some rows were chosen, on a GPU: read once, written once.

A program has a block of columns of one row of logits, and adds up, in their order, the gradients of
all that was chosen of it; with nothing chosen it writes zeros without reading.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_srpo.kernels.rows_triton import GRADIENT_BLOCK, GRADIENT_WARPS, by_logits


def gradients(
    logits_TV: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    softmax_3N: Tensor,
    by_output_2N: Tensor,
    num_real: int,
) -> Tensor:
    """[T, V] d loss / d logits, of their dtype; 0 in rows that are not chosen and from column
    `num_real` on. A target is a column; otherwise as `rows.gradients`."""
    num_rows, num_columns = logits_TV.shape
    assert logits_TV.stride(1) == 1 or num_columns < 2, "columns of logits lie apart"
    by_logits_TV = logits_TV.new_empty(logits_TV.shape)
    if not num_rows:
        return by_logits_TV
    order_N = torch.argsort(rows_N, stable=True)
    every_row = torch.arange(num_rows + 1, device=rows_N.device)
    launch: Any = _gradients[(num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK.value))]
    launch(
        by_logits_TV,
        logits_TV,
        order_N,
        torch.searchsorted(rows_N[order_N], every_row),
        targets_N,
        temperature_N,
        softmax_3N,
        by_output_2N,
        len(rows_N),
        num_columns,
        num_real,
        logits_TV.stride(0),
        num_warps=GRADIENT_WARPS,
    )
    return by_logits_TV


@triton.jit
def _gradients(
    out_ptr,
    logits_ptr,
    order_ptr,
    starts_ptr,
    targets_ptr,
    temperature_ptr,
    softmax_ptr,
    by_output_ptr,
    num_chosen,
    num_columns,
    num_real,
    row_stride,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * GRADIENT_BLOCK + tl.arange(0, GRADIENT_BLOCK)
    dtype = softmax_ptr.dtype.element_ty
    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    is_read = column < tl.where(end > start, num_real, 0)
    logits = tl.load(logits_ptr + row * row_stride + column, mask=is_read, other=0.0).to(dtype)
    total = tl.zeros((GRADIENT_BLOCK,), dtype)
    for position in range(start, end):
        chosen = tl.load(order_ptr + position)
        total += by_logits(
            logits,
            column == tl.load(targets_ptr + chosen),
            tl.load(temperature_ptr + chosen),
            tl.load(softmax_ptr + chosen),
            tl.load(softmax_ptr + num_chosen + chosen),
            tl.load(softmax_ptr + 2 * num_chosen + chosen),
            tl.load(by_output_ptr + chosen),
            tl.load(by_output_ptr + num_chosen + chosen),
        )
    out = tl.where(column < num_real, total, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_columns + column, out, mask=column < num_columns)

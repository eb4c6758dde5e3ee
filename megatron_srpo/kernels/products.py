"""How are bf16 matrices multiplied without rounding what comes out?   torch

A GPU adds up in fp32 and can leave it at that. A CPU may add up in the dtype of the factors, so
they are widened there. The head's weight is taken in chunks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 8192
"""Columns of logits at a time: wide enough for a GPU's matrix units, 0.5 GiB with 16k rows."""


def wide(like: Tensor) -> torch.dtype:
    """What sums are held in: fp32, and float64 for float64."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def chunks(weight_VH: Tensor, num_real: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each chunk of the real vocabulary."""
    for start in range(0, num_real, chunk):
        yield start, weight_VH[start : min(start + chunk, num_real)]


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product that is not rounded to the dtype of its factors."""
    dtype = wide(left)
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Rounded once, where `total` is."""
    if left.dtype == total.dtype == wide(left):
        total.addmm_(left, right)
    elif left.is_cuda and total.dtype == wide(left):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # no product beside it
    else:
        total += product(left, right)


def write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Rounded once, to the dtype of `out`, which is that of the factors."""
    if left.is_cuda or left.dtype == wide(left):
        torch.mm(left, right, out=out)
    else:
        out.copy_(product(left, right))

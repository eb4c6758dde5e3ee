"""Which tokens of a packed micro-batch has each context parallel rank?

Zig-zag, as Megatron's rotary embedding and Transformer Engine's attention have it: each sequence
is cut into 2 CP pieces, and rank r holds piece r and piece 2 CP - 1 - r, so that under a causal
mask all ranks have equally much to do. Legend: T packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag(cu_seqlens: Tensor, size: int) -> list[Tensor]:
    """[rank] -> [T / size] which tokens it holds, in its order; every sequence's length is a
    multiple of 2 size.

    >>> [tokens.tolist() for tokens in zigzag(torch.tensor([0, 4, 12]), 2)]
    [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]
    """
    tokens = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    pieces = [sequence.chunk(2 * size) for sequence in tokens.split(cu_seqlens.diff().tolist())]
    return [
        torch.cat([torch.cat([p[rank], p[2 * size - 1 - rank]]) for p in pieces])
        for rank in range(size)
    ]


def gather_sequences(local: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T / CP, ...] -> [T, ...] in the order of the sequences; gradients come back summed."""
    order = torch.cat(zigzag(cu_seqlens, group.size()))
    gathered: Any = _Gather.apply(local, group)
    return torch.empty_like(gathered).index_copy(0, order, gathered)


def with_others(local_T: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T / CP] -> [T] in the order of the sequences; the other ranks' values are constants."""
    orders = zigzag(cu_seqlens, group.size())
    parts = [torch.empty_like(local_T) for _ in orders]
    dist.all_gather(parts, local_T.detach().contiguous(), group=group)
    gathered_T = torch.empty_like(torch.cat(parts)).index_copy(
        0, torch.cat(orders), torch.cat(parts)
    )
    return gathered_T.index_copy(0, orders[group.rank()], local_T)


class _Gather(torch.autograd.Function):
    """All ranks' rows, one after the other."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.chunk(ctx.group.size())[ctx.group.rank()], None

"""What does a policy's head say of its targets?   hidden states x weight -> log-prob and entropy

    logits = hidden W^T / temperature    never whole: in chunks of the vocabulary

The forward pass keeps four numbers a row (`rows.py`); the backward pass computes each chunk of
logits again, makes its gradient of it, and adds that to those of hidden states and weight. Beside
inputs and outputs that takes a few chunks [N, chunk] of memory, whatever the vocabulary's size.

Under tensor parallelism each rank holds some rows of W. One all-gather of the four numbers a row;
every rank then merges them in the order of the ranks, in float64: all get the same bits. The
gradient of the hidden states is this rank's share: whoever handed them out sums it up.

Logits are products in the inputs' dtype with sums in fp32 (float64 inputs: float64), never
rounded; so is everything behind them, but for d loss / d logits, which enters its products
rounded to the weight's dtype. Legend: N rows, V rows of this rank's weight, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.distributed_c10d import GroupName

from megatron_srpo.kernels import rows

CHUNK = 8192
"""Columns of logits at a time: wide enough for a GPU's matrix units, 0.5 GiB with 16k rows."""


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: Tensor | float,
    first_id: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """[N], [N] log-prob of each target and entropy, nats, in fp32 (float64 of float64 inputs);
    both differentiable with respect to hidden states and weight.

    `targets_N` are token ids. `weight_VH` holds the ids from `first_id` on, and of its rows only
    the first `num_real` are tokens that exist. `temperature` is one, or [N]. The ranks of `group`
    hold the rest of the vocabulary: a collective, of equally many rows on each.
    """
    if not isinstance(temperature, Tensor):
        temperature = hidden_NH.new_full(targets_N.shape, temperature, dtype=_wide(hidden_NH))
    group_name = group.group_name if group is not None and group.size() > 1 else ""
    logprob_N, entropy_N, _ = torch.ops.megatron_srpo.linear_logprob(
        hidden_NH,
        weight_VH,
        targets_N,
        temperature,
        first_id,
        len(weight_VH) if num_real is None else num_real,
        group_name,
        chunk,
    )
    return logprob_N, entropy_N


@torch.library.custom_op("megatron_srpo::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    first_id: int,
    num_real: int,
    group_name: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy, and what the backward pass needs: [3, N] m, log s, entropy"""
    wide, num_rows = _wide(hidden_NH), len(targets_N)
    temperature_N = temperature_N.to(wide).contiguous()
    stats_4N = rows.nothing_seen(num_rows, like=temperature_N)
    for start, weight_CH in _chunks(weight_VH, num_real, chunk):
        logits_NC = _product(hidden_NH, weight_CH.T)
        _rows_of(logits_NC).absorb(stats_4N, logits_NC, targets_N - first_id - start, temperature_N)
    gathered = all_gather_tensor(stats_4N, 0, GroupName(group_name)) if group_name else stats_4N
    m, s, u, t = rows.merged(gathered.view(len(gathered) // 4, 4, num_rows).double())
    log_sum_N = s.log()
    logprob_N, entropy_N = (t - m) - log_sum_N, log_sum_N - u / s
    softmax_3N = torch.stack([m, log_sum_N, entropy_N])
    return logprob_N.to(wide), entropy_N.to(wide), softmax_3N.to(wide)


@_linear_logprob.register_fake
def _(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, wide = len(targets_N), _wide(hidden_NH)
    return (
        hidden_NH.new_empty(num_rows, dtype=wide),
        hidden_NH.new_empty(num_rows, dtype=wide),
        hidden_NH.new_empty(3, num_rows, dtype=wide),
    )


@torch.library.custom_op("megatron_srpo::linear_logprob_backward", mutates_args=())
def _backward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    softmax_3N: Tensor,
    by_output_2N: Tensor,
    first_id: int,
    num_real: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """d loss / d hidden states, through this rank's columns, and / d weight"""
    temperature_N = temperature_N.to(softmax_3N.dtype).contiguous()
    by_hidden_NH = torch.zeros_like(hidden_NH, dtype=softmax_3N.dtype)
    by_weight_VH = torch.empty_like(weight_VH)
    by_weight_VH[num_real:] = 0
    for start, weight_CH in _chunks(weight_VH, num_real, chunk):
        logits_NC = _product(hidden_NH, weight_CH.T)
        by_logits_NC = _rows_of(logits_NC).gradients(
            logits_NC,
            targets_N - first_id - start,
            temperature_N,
            softmax_3N,
            by_output_2N,
            weight_VH.dtype,
        )
        _add_product(by_hidden_NH, by_logits_NC, weight_CH)
        by_weight_CH = by_weight_VH[start : start + len(weight_CH)]
        _write_product(by_weight_CH, by_logits_NC.T, hidden_NH)
    return by_hidden_NH.to(hidden_NH.dtype), by_weight_VH


@_backward.register_fake
def _(hidden_NH: Tensor, weight_VH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_NH), torch.empty_like(weight_VH)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_id, num_real, _, chunk = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.numbers = first_id, num_real, chunk
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, by_logprob_N: Tensor, by_entropy_N: Tensor, _: Tensor) -> Any:
    by_hidden_NH, by_weight_VH = torch.ops.megatron_srpo.linear_logprob_backward(
        *ctx.saved_tensors, torch.stack([by_logprob_N, by_entropy_N]), *ctx.numbers
    )
    return by_hidden_NH, by_weight_VH, *[None] * 6


_linear_logprob.register_autograd(_differentiate, setup_context=_remember)


def _chunks(weight_VH: Tensor, num_real: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each chunk of the real vocabulary."""
    for start in range(0, num_real, chunk):
        yield start, weight_VH[start : min(start + chunk, num_real)]


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product that is not rounded to the dtype of its factors."""
    wide = _wide(left)
    if left.is_cuda and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Rounded once, to the dtype of `out`, which is that of the factors."""
    if left.is_cuda or left.dtype == _wide(left):
        torch.mm(left, right, out=out)
    else:  # a CPU may add up in the dtype of the factors
        out.copy_(_product(left, right))


def _rows_of(logits: Tensor) -> Any:
    """The functions of `rows.py`, for the device that the logits are on."""
    if not logits.is_cuda:
        return rows
    from megatron_srpo.kernels import rows_triton  # a machine without a GPU may have no Triton

    return rows_triton

"""What do logits say of the targets of some of their rows?   logits -> log-prob and entropy

For logits that are there anyway; `linear_logprob.py` is for those that never should be. Logits are
read once each way, in their own dtype; statistics are `rows.py`'s, in fp32 (float64 logits:
float64), and so is the gradient until it is written, rounded once to the dtype of the logits. Rows
that are not chosen are not read, and have a gradient of 0; one that is chosen several times has the
sum of its gradients. No atomics: two runs give the same bits.

Legend: T rows of logits, N chosen ones, V columns of this rank's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.kernels import rows
from megatron_srpo.kernels.products import CHUNK, wide


def logprob_stats(
    logits_TV: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    *,
    temperature: Tensor | float,
    first_id: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """[N], [N] log-prob of each target and entropy, nats, in fp32 (float64 of float64 logits); both
    differentiable with respect to the logits.

    `rows_N` (int64) are the rows of logits that matter, in any order, `targets_N` their token ids.
    Column 0 is token `first_id`, and only the first `num_real` columns are tokens that exist.
    `temperature` is one, or [N]. The ranks of `group` hold the other columns: a collective, of
    equally many chosen rows on each.
    """
    if not isinstance(temperature, Tensor):
        temperature = logits_TV.new_full(targets_N.shape, temperature, dtype=wide(logits_TV))
    logprob_N, entropy_N, _ = torch.ops.megatron_srpo.logprob_stats(
        logits_TV,
        rows_N,
        targets_N,
        temperature,
        first_id,
        logits_TV.shape[1] if num_real is None else num_real,
        rows.name_of(group),
    )
    return logprob_N, entropy_N


@torch.library.custom_op("megatron_srpo::logprob_stats", mutates_args=())
def _logprob_stats(
    logits_TV: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    first_id: int,
    num_real: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy, and what the backward pass needs: [3, N] m, log s, entropy"""
    temperature_N = temperature_N.to(wide(logits_TV)).contiguous()
    stats_4N = rows.nothing_seen(len(rows_N), like=temperature_N)
    for start in range(0, num_real, CHUNK):
        logits_TC = logits_TV[:, start : min(start + CHUNK, num_real)]
        logits_NC = logits_TC.index_select(0, rows_N).to(temperature_N.dtype)
        rows.absorb(stats_4N, logits_NC, targets_N - first_id - start, temperature_N)
    return rows.whole(stats_4N, temperature_N, group_name)


@_logprob_stats.register_kernel("cuda")
def _(
    logits_TV: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    first_id: int,
    num_real: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from megatron_srpo.kernels import rows_triton

    temperature_N = temperature_N.to(wide(logits_TV)).contiguous()
    stats_4N = rows.nothing_seen(len(rows_N), like=temperature_N)
    real_TV, targets_N = logits_TV[:, :num_real], (targets_N - first_id).contiguous()
    rows_triton.absorb_chosen(stats_4N, real_TV, rows_N.contiguous(), targets_N, temperature_N)
    return rows.whole(stats_4N, temperature_N, group_name)


@_logprob_stats.register_fake
def _(logits_TV: Tensor, rows_N: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, dtype = len(rows_N), wide(logits_TV)
    return (
        logits_TV.new_empty(num_rows, dtype=dtype),
        logits_TV.new_empty(num_rows, dtype=dtype),
        logits_TV.new_empty(3, num_rows, dtype=dtype),
    )


@torch.library.custom_op("megatron_srpo::logprob_stats_backward", mutates_args=())
def _backward(
    logits_TV: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    softmax_3N: Tensor,
    by_output_2N: Tensor,
    first_id: int,
    num_real: int,
) -> Tensor:
    """d loss / d logits, of their dtype"""
    temperature_N = temperature_N.to(softmax_3N.dtype).contiguous()
    by_logits_TV = logits_TV.new_zeros(logits_TV.shape)
    for start in range(0, num_real, CHUNK):
        here = slice(start, min(start + CHUNK, num_real))
        by_chosen_NC = rows.gradients(
            logits_TV[:, here].index_select(0, rows_N).to(temperature_N.dtype),
            targets_N - first_id - start,
            temperature_N,
            softmax_3N,
            by_output_2N,
            temperature_N.dtype,
        )
        by_logits_TC = by_chosen_NC.new_zeros(len(logits_TV), by_chosen_NC.shape[1])
        by_logits_TV[:, here] = by_logits_TC.index_add_(0, rows_N, by_chosen_NC)
    return by_logits_TV


@_backward.register_kernel("cuda")
def _(
    logits_TV: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    softmax_3N: Tensor,
    by_output_2N: Tensor,
    first_id: int,
    num_real: int,
) -> Tensor:
    from megatron_srpo.kernels import logprob_stats_triton

    return logprob_stats_triton.gradients(
        logits_TV,
        rows_N,
        (targets_N - first_id).contiguous(),
        temperature_N.to(softmax_3N.dtype).contiguous(),
        softmax_3N,
        by_output_2N,
        num_real,
    )


@_backward.register_fake
def _(logits_TV: Tensor, *_: Any) -> Tensor:
    return logits_TV.new_empty(logits_TV.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_id, num_real, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.numbers = first_id, num_real
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, by_logprob_N: Tensor, by_entropy_N: Tensor, _: Tensor) -> Any:
    by_logits_TV = torch.ops.megatron_srpo.logprob_stats_backward(
        *ctx.saved_tensors, torch.stack([by_logprob_N, by_entropy_N]), *ctx.numbers
    )
    return by_logits_TV, *[None] * 6


_logprob_stats.register_autograd(_differentiate, setup_context=_remember)

"""What does a chunk of a row's logits add to its softmax, and what gradient do they have?   torch

Statistics of a row x at temperature T that can be taken piece by piece, in any pieces:

    m = max x    s = sum exp((x - m) / T)    u = sum exp((x - m) / T) (x - m) / T
    t = x of the target

    log-prob = (t - m) / T - log s    entropy = log s - u / s

Relative to m throughout: sum exp(x / T) x, or t / T - (m / T + log s), lose all digits of a
difference where logits are large; so does x / T before it is subtracted. Where nothing was seen
yet, or all of it is -inf, m is -inf, s and u are 0; t is -inf until the target is met. NaN stays
NaN.

Under tensor parallelism each rank has statistics of its columns. One all-gather of the four numbers
a row; every rank then merges them in the order of the ranks, in float64: all get the same bits.

`rows_triton.py` has `absorb`, `concluded` and `gradients` for GPUs. Legend: N rows, C columns of a
chunk.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.distributed_c10d import GroupName

NEGLIGIBLE = -1000.0
"""Differences to the maximum are cut here: exp is 0 on either side, in float64 too, and
0 x difference is then 0 instead of NaN."""


def nothing_seen(num_rows: int, *, like: Tensor) -> Tensor:
    """[4, N] m, s, u, t before the first chunk."""
    stats_4N = like.new_full((4, num_rows), -torch.inf)
    stats_4N[1:3] = 0
    return stats_4N


def merged(parts: Tensor, temperature_N: Tensor) -> Tensor:
    """[parts, 4, N] -> [4, N] of all their columns together."""
    m, s, u, t = parts.unbind(1)
    largest_N = m.amax(0)
    shift = _relative(m, largest_N, temperature_N)
    weight = shift.exp()
    return torch.stack(
        [largest_N, (weight * s).sum(0), (weight * (u + shift * s)).sum(0), t.amax(0)]
    )


def whole(
    stats_4N: Tensor, temperature_N: Tensor, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """[N] log-prob, [N] entropy, and what `gradients` needs of the whole rows, [3, N] m, log s,
    entropy: of the columns of all ranks of a group, or, without a name, of this rank's."""
    num_rows = stats_4N.shape[1]
    gathered = all_gather_tensor(stats_4N, 0, GroupName(group_name)) if group_name else stats_4N
    parts = gathered.view(len(gathered) // 4, 4, num_rows)
    return functions_for(stats_4N).concluded(parts, temperature_N)


def concluded(parts: Tensor, temperature_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `whole`, of [parts, 4, N] statistics; in float64 until the end."""
    temperature, dtype = temperature_N.double(), parts.dtype
    m, s, u, t = merged(parts.double(), temperature)
    log_sum_N = s.log()
    entropy_N = log_sum_N - u / s
    softmax_3N = torch.stack([m, log_sum_N, entropy_N])
    logprob_N = (t - m) / temperature - log_sum_N
    return logprob_N.to(dtype), entropy_N.to(dtype), softmax_3N.to(dtype)


def name_of(group: dist.ProcessGroup | None) -> str:
    """As operations are told of a group; "" if there is nobody to talk to."""
    return group.group_name if group is not None and group.size() > 1 else ""


def functions_for(logits: Tensor) -> Any:
    """This module, or the one that has what GPUs run of it."""
    if not logits.is_cuda:
        return sys.modules[__name__]
    from megatron_srpo.kernels import rows_triton  # a machine without a GPU may have no Triton

    return rows_triton


def absorb(stats_4N: Tensor, logits_NC: Tensor, targets_N: Tensor, temperature_N: Tensor) -> None:
    """Adds a chunk to `stats_4N`. A target is a column of the chunk, or any number outside [0, C)
    where it lies elsewhere."""
    num_columns = logits_NC.shape[1]
    target_N = logits_NC.gather(1, targets_N.clamp(0, num_columns - 1)[:, None])[:, 0]
    is_here_N = (targets_N >= 0) & (targets_N < num_columns)
    m = logits_NC.amax(1)
    shift_NC = _relative(logits_NC, m[:, None], temperature_N[:, None])
    weight_NC = shift_NC.exp()
    s, u = weight_NC.sum(1), weight_NC.mul_(shift_NC).sum(1)
    t = torch.where(is_here_N, target_N, -torch.inf)
    parts = torch.stack([stats_4N, torch.stack([m, s, u, t])])
    stats_4N.copy_(merged(parts, temperature_N))


def gradients(
    logits_NC: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    softmax_3N: Tensor,
    by_output_2N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[N, C] of `dtype`: d loss / d logits; overwrites `logits_NC`.

    `softmax_3N` is m, log s and entropy of the whole rows, `by_output_2N` d loss / d log-prob and
    d loss / d entropy. With log p = (x - m) / T - log s:

        d log-prob / d x = (onehot - p) / T    d entropy / d x = -p (log p + entropy) / T
    """
    largest_N, log_sum_N, entropy_N = softmax_3N[:, :, None]
    by_logprob_N, by_entropy_N = by_output_2N[:, :, None]
    relative_NC = _relative(logits_NC, largest_N, temperature_N[:, None], in_place=True)
    logp_NC = relative_NC.sub_(log_sum_N)
    p_NC = logp_NC.exp()
    found_NC = logp_NC.add_(entropy_N).mul_(by_entropy_N).add_(by_logprob_N).mul_(p_NC).neg_()
    rows_N = ((targets_N >= 0) & (targets_N < found_NC.shape[1])).nonzero()[:, 0]
    found_NC[rows_N, targets_N[rows_N]] += by_logprob_N[rows_N, 0]
    return found_NC.div_(temperature_N[:, None]).to(dtype)


def _relative(x: Tensor, largest: Tensor, temperature: Tensor, *, in_place: bool = False) -> Tensor:
    """(x - largest) / temperature, between `NEGLIGIBLE` and 0; a maximum of -inf is any very low
    number."""
    finite = largest.clamp(min=torch.finfo(largest.dtype).min)
    difference = x.sub_(finite) if in_place else x - finite
    return difference.div_(temperature).clamp_(min=NEGLIGIBLE)

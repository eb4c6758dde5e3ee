"""What does a chunk of a row's logits add to its softmax, and what gradient do they have?   torch

Statistics of a row z (logit / temperature) that can be taken piece by piece, in any pieces:

    m = max z    s = sum exp(z - m)    u = sum exp(z - m) (z - m)    t = z of the target

    log-prob = (t - m) - log s    entropy = log s - u / s

Relative to m throughout: sum exp(z - m) z, or t - (m + log s), lose all digits of a difference
where logits are large. Where nothing was seen yet, or all of it is -inf, m is -inf, s and u are 0;
t is -inf until the target is met. NaN stays NaN.

`rows_triton.py` has the same two functions for GPUs. Legend: N rows, C columns of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = -1000.0
"""Differences to the maximum are cut here: exp is 0 on either side, in float64 too, and
0 x difference is then 0 instead of NaN."""


def nothing_seen(num_rows: int, *, like: Tensor) -> Tensor:
    """[4, N] m, s, u, t before the first chunk."""
    stats_4N = like.new_zeros(4, num_rows)
    stats_4N[0] = stats_4N[3] = -torch.inf
    return stats_4N


def merged(parts: Tensor) -> Tensor:
    """[parts, 4, N] -> [4, N] of all their columns together."""
    m, s, u, t = parts.unbind(1)
    largest_N = m.amax(0)
    shift = _relative(m, largest_N)
    weight = shift.exp()
    return torch.stack(
        [largest_N, (weight * s).sum(0), (weight * (u + shift * s)).sum(0), t.amax(0)]
    )


def absorb(stats_4N: Tensor, logits_NC: Tensor, targets_N: Tensor, temperature_N: Tensor) -> None:
    """Adds a chunk to `stats_4N`; overwrites `logits_NC`. A target is a column of the chunk, or
    any number outside [0, C) where it lies elsewhere."""
    num_columns = logits_NC.shape[1]
    z_NC = logits_NC.div_(temperature_N[:, None])
    target_N = z_NC.gather(1, targets_N.clamp(0, num_columns - 1)[:, None])[:, 0]
    is_here_N = (targets_N >= 0) & (targets_N < num_columns)
    m = z_NC.amax(1)
    shift_NC = _relative(z_NC, m[:, None], in_place=True)
    weight_NC = shift_NC.exp()
    s, u = weight_NC.sum(1), weight_NC.mul_(shift_NC).sum(1)
    t = torch.where(is_here_N, target_N, -torch.inf)
    stats_4N.copy_(merged(torch.stack([stats_4N, torch.stack([m, s, u, t])])))


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
    d loss / d entropy. With log p = z - m - log s:

        d log-prob / d z = onehot - p    d entropy / d z = -p (log p + entropy)
    """
    largest_N, log_sum_N, entropy_N = softmax_3N[:, :, None]
    by_logprob_N, by_entropy_N = by_output_2N[:, :, None]
    z_NC = logits_NC.div_(temperature_N[:, None])
    logp_NC = _relative(z_NC, largest_N, in_place=True).sub_(log_sum_N)
    p_NC = logp_NC.exp()
    found_NC = logp_NC.add_(entropy_N).mul_(by_entropy_N).add_(by_logprob_N).mul_(p_NC).neg_()
    rows_N = ((targets_N >= 0) & (targets_N < z_NC.shape[1])).nonzero()[:, 0]
    found_NC[rows_N, targets_N[rows_N]] += by_logprob_N[rows_N, 0]
    return found_NC.div_(temperature_N[:, None]).to(dtype)


def _relative(z: Tensor, largest: Tensor, *, in_place: bool = False) -> Tensor:
    """z - largest, between `NEGLIGIBLE` and 0; a maximum of -inf is any very low number."""
    finite = largest.clamp(min=torch.finfo(largest.dtype).min)
    return (z.sub_(finite) if in_place else z - finite).clamp_(min=NEGLIGIBLE)

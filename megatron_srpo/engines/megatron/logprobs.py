"""Token log-probs and entropies from vocabulary-parallel logits, in fp32.

Legend: T packed tokens, V padded vocabulary / TP.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

NEVER = -1e30
"""The logit of a row that pads the vocabulary: finite, so that 0 x log 0 is 0."""


def scaled_logits(logits_TV: Tensor, *, temperature: float, num_real: int) -> Tensor:
    """[T, V] a fp32 copy, divided by the temperature that the rollout was sampled with; only the
    first `num_real` columns of this rank's are tokens that exist."""
    scaled_TV = logits_TV.float() / temperature
    if num_real < scaled_TV.shape[-1]:
        scaled_TV[:, num_real:] = NEVER
    return scaled_TV


def token_logprobs(scaled_TV: Tensor, target_ids_T: Tensor) -> Tensor:
    """[T] log-prob of each target, nats. Megatron's cross entropy overwrites `scaled_TV`."""
    return -vocab_parallel_cross_entropy(scaled_TV.unsqueeze(1), target_ids_T.unsqueeze(1))[:, 0]


@torch.no_grad()
def token_entropies(scaled_TV: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """[T] entropy of the next-token distribution, nats."""
    largest_T = scaled_TV.amax(dim=-1)
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    shifted_TV = scaled_TV - largest_T.unsqueeze(-1)
    weights_TV = shifted_TV.exp()
    sums_2T = torch.stack([weights_TV.sum(-1), (weights_TV * shifted_TV).sum(-1)])
    dist.all_reduce(sums_2T, group=group)
    total_T, weighted_T = sums_2T
    return total_T.log() - weighted_T / total_T

"""Token log-probs and entropies from vocabulary-parallel logits, in fp32.

Legend: T packed tokens, V vocabulary / TP.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def token_logprobs(logits_TV: Tensor, target_ids_T: Tensor, *, temperature: float) -> Tensor:
    """[T] log-prob of each target at the temperature that the rollout was sampled with, nats."""
    # Megatron's cross entropy overwrites its input: the division makes the copy that it may have.
    scaled_TV = logits_TV.float() / temperature
    return -vocab_parallel_cross_entropy(scaled_TV.unsqueeze(1), target_ids_T.unsqueeze(1))[:, 0]


@torch.no_grad()
def token_entropies(logits_TV: Tensor, *, temperature: float, group: dist.ProcessGroup) -> Tensor:
    """[T] entropy of the next-token distribution, nats."""
    scaled_TV = logits_TV.float() / temperature
    largest_T = scaled_TV.amax(dim=-1)
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    shifted_TV = scaled_TV - largest_T.unsqueeze(-1)
    weights_TV = shifted_TV.exp()
    sums_2T = torch.stack([weights_TV.sum(-1), (weights_TV * shifted_TV).sum(-1)])
    dist.all_reduce(sums_2T, group=group)
    total_T, weighted_T = sums_2T
    return total_T.log() - weighted_T / total_T

"""What does the policy's head say of its targets?   hidden states -> log-probs and entropies

    fused       the tokens that the loss wants, in chunks of the vocabulary: no [T, V] anywhere
    reference   logits of all tokens, an fp32 copy of them, Megatron's cross entropy

In fp32, over a vocabulary that tensor parallel ranks share. Legend: T packed tokens, H hidden size,
V padded vocabulary / TP.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_srpo.kernels.linear_logprob import linear_logprob

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


class Head(Protocol):
    """Collective over the ranks of `group`."""

    def __call__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_ids_T: Tensor,
        is_wanted_T: Tensor,
        *,
        temperature: float,
        num_real: int,
        group: dist.ProcessGroup,
        main_grad_VH: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[T] log-prob of each target, differentiable, and [T] entropy, nats; 0 where not wanted.

        `weight_VH` is this rank's shard, of equally many rows on each; its first `num_real` rows
        are tokens that exist. Its gradient may be added to `main_grad_VH`, which is where
        Megatron's DistributedDataParallel adds gradients up, instead of going back.
        """
        ...


def fused(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_ids_T: Tensor,
    is_wanted_T: Tensor,
    *,
    temperature: float,
    num_real: int,
    group: dist.ProcessGroup,
    main_grad_VH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A `Head`: tokens that are not wanted cost nothing."""
    if main_grad_VH is not None:
        # Megatron's word for it: what comes back as this weight's gradient is no part of it, unless
        # the weight is an embedding too (`zero_out_wgrad`); that adds its own to the 0 that comes.
        told: Any = weight_VH
        told.grad_added_to_main_grad = True
    rows = is_wanted_T.nonzero()[:, 0]
    logprobs, entropies = linear_logprob(
        hidden_TH.index_select(0, rows),
        weight_VH,
        target_ids_T[rows],
        temperature=temperature,
        first_id=group.rank() * len(weight_VH),
        num_real=num_real,
        group=group,
        main_grad_VH=main_grad_VH,
    )
    nothing_T = logprobs.new_zeros(is_wanted_T.shape)
    return nothing_T.index_copy(0, rows, logprobs), nothing_T.index_copy(0, rows, entropies)


def reference(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_ids_T: Tensor,
    is_wanted_T: Tensor,
    *,
    temperature: float,
    num_real: int,
    group: dist.ProcessGroup,
    main_grad_VH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A `Head`: what the fused one is compared with."""
    scaled_TV = scaled_logits(
        F.linear(hidden_TH, weight_VH), temperature=temperature, num_real=num_real
    )
    entropies_T = token_entropies(scaled_TV.detach(), group=group)
    logprobs_T = token_logprobs(scaled_TV, target_ids_T)
    return torch.where(is_wanted_T, logprobs_T, 0.0), torch.where(is_wanted_T, entropies_T, 0.0)


HEADS: dict[Literal["fused", "reference"], Head] = {"fused": fused, "reference": reference}

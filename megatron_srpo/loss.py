"""The policy loss of one micro-batch. torch, no torch.distributed. Legend: T packed tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def policy_loss(
    logprobs_T: Tensor, loss_weight_T: Tensor, advantage_T: Tensor, *, denominator: float
) -> Tensor:
    """- sum_t w_t A_t log pi(t) / denominator, a scalar (paper section 3: no ratio, no clip).

    `denominator` is a *global* count, so micro-batches and ranks add up to the gradient of one
    big batch. With one update per rollout batch the ratio current/old is 1 and its gradient is
    that of the log-prob: this is the same step as the ratio form, and its value means more.
    """
    return -(loss_weight_T * advantage_T * logprobs_T).sum() / denominator


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """How far the trainer's log-probs are from the rollout engine's; scalars, float64."""

    abs_sum: Tensor
    abs_max: Tensor
    k3_sum: Tensor
    """sum of r - 1 - log r with r = trainer / rollout: an estimate of KL(rollout, trainer)."""


def mismatch(logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> Mismatch:
    """Over the given tokens; 0 where there are none."""
    difference_T = (logprobs_T.detach() - rollout_logprobs_T).double()
    abs_T = difference_T.abs()
    return Mismatch(
        abs_sum=abs_T.sum(),
        abs_max=abs_T.max() if abs_T.numel() else abs_T.new_zeros(()),
        k3_sum=(difference_T.exp() - 1 - difference_T).sum(),
    )

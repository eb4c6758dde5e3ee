"""What does a micro-batch's step go down?   log-probs of its tokens -> loss, counters

    L = sum_t w_t (kl_coef k3_t - rho_t s_t) / D

s_t   surrogate. reinforce: A_t log pi_t (paper section 3). ppo: min(r_t A_t, clip(r_t) A_t) with
      r = pi / old (Schulman et al. 2017, arXiv 1707.06347, eq. 7; an upper bound of its own:
      DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.1)
rho_t importance weight old / rollout, a constant for the gradient: of the token, or of its whole
      response (the product). truncate: min(rho, cap) (truncated importance sampling, Ionides 2008;
      IMPALA, Espeholt et al. 2018, arXiv 1802.01561, section 4.1). mask: 0 above the cap.
k3_t  exp(d) - 1 - d, d = log reference - log pi: unbiased for KL(pi, reference) where pi sampled
      the token, never negative (Schulman 2020, "Approximating KL Divergence")
D     a *global* count, so micro-batches and ranks add up to the gradient of one big batch

Demonstrations, tokens that nobody sampled, have s_t = A_t log pi_t, rho_t = 1, no k3_t.
At the first update r = 1 and its gradient is that of the log-prob: reinforce takes the same step.

torch, no torch.distributed. `kernels/policy_loss.py` is the same as one operation, whose CPU
implementation `token_terms` is. Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_srpo.config import LossConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTensors:
    """What is known of a micro-batch's targets, beside the log-probs in training."""

    loss_weight_T: Tensor
    advantage_T: Tensor
    rollout_T: Tensor
    """Log-probs of whoever sampled; NaN: a demonstration."""
    old_T: Tensor | None
    """Log-probs of the policy before the step's first update; None: this is the first."""
    reference_T: Tensor | None
    """Log-probs of the initial policy; needed if `kl_coef` is not 0."""
    cu_seqlens: Tensor
    """[S + 1] where sequences begin, and the end."""

    @property
    def is_demonstration_T(self) -> Tensor:
        return self.rollout_T.isnan()

    @property
    def is_sampled_T(self) -> Tensor:
        """Trained, and sampled by somebody."""
        return (self.loss_weight_T != 0) & ~self.is_demonstration_T


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counters:
    """Scalars (float64) that add over micro-batches and ranks."""

    quotients: dict[str, tuple[Tensor, Tensor]]
    """Metric -> sum, count; a count of 0 throughout makes a plain sum."""
    maxima: dict[str, Tensor]
    """Metric -> value; 0 where there are no tokens."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTerms:
    """What each token adds, each [T], and none of it divided by anything."""

    loss_T: Tensor
    """Differentiable; D L is its sum."""
    slope_T: Tensor
    """d loss_T / d log-prob, as a number."""
    means: dict[str, Tensor]
    """Metric -> values; of the sampled tokens."""
    maxima: dict[str, Tensor]


def policy_loss(
    logprobs_T: Tensor, tokens: TokenTensors, cfg: LossConfig, *, denominator: float
) -> tuple[Tensor, Counters]:
    """L, a scalar, and what `cfg` makes worth watching; `denominator` is D."""
    return summed(token_terms(logprobs_T, tokens, cfg), tokens, denominator)


def summed(terms: TokenTerms, tokens: TokenTensors, denominator: float) -> tuple[Tensor, Counters]:
    """L and counters of what `token_terms` gives."""
    loss, sampled_T = terms.loss_T.sum() / denominator, tokens.is_sampled_T
    shown = torch.where(tokens.is_demonstration_T, terms.loss_T.detach(), 0.0).sum() / denominator
    zero = torch.zeros((), dtype=torch.float64, device=loss.device)
    return loss, Counters(
        quotients={
            "loss": (loss.detach().double(), zero),
            "loss/demonstrations": (shown.double(), zero),
            "tokens/trained": (sampled_T.sum().double(), zero),
        }
        | {name: over_sampled(values_T, tokens) for name, values_T in terms.means.items()},
        maxima={
            name: F.pad(torch.where(sampled_T, v_T, 0.0), (0, 1)).amax()
            for name, v_T in terms.maxima.items()
        },
    )


def token_terms(logprobs_T: Tensor, tokens: TokenTensors, cfg: LossConfig) -> TokenTerms:
    """All formulas of the module."""
    current_T, sampled_T = logprobs_T.detach(), tokens.is_sampled_T

    def sampled_or_current(other_T: Tensor | None) -> Tensor:
        # All differences to the policy are then 0 where nothing was sampled: no exp overflows
        # there and no NaN enters, whose gradient would be NaN even behind a torch.where.
        return current_T if other_T is None else torch.where(sampled_T, other_T, current_T)

    old_T = sampled_or_current(tokens.old_T)
    off_T = (old_T - sampled_or_current(tokens.rollout_T)).double()
    means, maxima = _mismatch(off_T)
    credit_T = tokens.loss_weight_T * tokens.advantage_T
    score_T, steepness_T = logprobs_T, torch.ones_like(current_T)
    if cfg.surrogate == "ppo" or cfg.updates_per_batch > 1:
        maxima["loss/ratio_max"] = (current_T - old_T).exp()
    if cfg.surrogate == "ppo":
        log_ratio_T = logprobs_T - old_T
        bites_T = _clip_bites(log_ratio_T.detach(), tokens.advantage_T, cfg)
        ratio_T = _clipped_ratio(log_ratio_T, bites_T, cfg)
        score_T = torch.where(tokens.is_demonstration_T, logprobs_T, ratio_T)
        steepness_T = torch.where(bites_T, 0.0, ratio_T.detach())
        means["loss/clip_fraction"] = bites_T
    if cfg.importance != "none":
        weight_T = _importance(off_T, tokens.cu_seqlens, cfg)
        used_T = torch.where(sampled_T, _capped(weight_T, cfg), 1.0)
        credit_T = credit_T * used_T.to(credit_T.dtype)
        means |= {
            "importance/weight_mean": used_T,
            "importance/capped_rate": weight_T > cfg.importance_cap,
        }
    loss_T, slope_T = -(credit_T * score_T), -(credit_T * steepness_T)
    if cfg.kl_coef:
        assert tokens.reference_T is not None, "a KL term needs a reference policy"
        difference_T = sampled_or_current(tokens.reference_T) - logprobs_T
        k3_T, cost_T = _k3(difference_T), cfg.kl_coef * tokens.loss_weight_T
        loss_T = loss_T + cost_T * k3_T
        slope_T = slope_T - cost_T * difference_T.detach().expm1()
        means["loss/kl_reference"] = k3_T.detach()
    return TokenTerms(loss_T=loss_T, slope_T=slope_T, means=means, maxima=maxima)


def over_sampled(values_T: Tensor, tokens: TokenTensors) -> tuple[Tensor, Tensor]:
    """Sum over the sampled tokens and their number; a NaN among them does not hide."""
    sampled_T = tokens.is_sampled_T
    return torch.where(sampled_T, values_T.double(), 0.0).sum(), sampled_T.sum().double()


def _mismatch(off_T: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of trainer (old) and rollout engine, off = log old - log rollout: means and maxima.

    k1 and k3 both estimate KL(rollout, old); the weights exp(off) have mean 1 if nothing is wrong.
    """
    weight_T = off_T.exp()
    means = {
        "mismatch/logprob_abs_mean": off_T.abs(),
        "mismatch/kl_k1": -off_T,
        "mismatch/kl_k3": _k3(off_T),
        "mismatch/weight_mean": weight_T,
        "mismatch/weight_square_mean": weight_T.square(),
    }
    return means, {"mismatch/logprob_abs_max": off_T.abs()}


def _k3(difference_T: Tensor) -> Tensor:
    """Of log q - log p where p sampled: an estimate of KL(p, q), exactly 0 if they agree."""
    return difference_T.expm1() - difference_T


def _clip_bites(log_ratio_T: Tensor, advantage_T: Tensor, cfg: LossConfig) -> Tensor:
    """Where the policy has already moved far enough the way that the advantage asks for."""
    too_likely_T = (advantage_T > 0) & (log_ratio_T > math.log1p(cfg.clip_high))
    too_unlikely_T = (advantage_T < 0) & (log_ratio_T < math.log1p(-cfg.clip_low))
    return too_likely_T | too_unlikely_T


def _clipped_ratio(log_ratio_T: Tensor, bites_T: Tensor, cfg: LossConfig) -> Tensor:
    """What min(r A, clip(r) A) makes of r: clipped, hence without a gradient, where it bites."""
    # Clipped before exp: behind it, an infinite ratio would give 0 x inf = NaN as its gradient.
    bound_T = log_ratio_T.detach().clamp(math.log1p(-cfg.clip_low), math.log1p(cfg.clip_high))
    return torch.where(bites_T, bound_T, log_ratio_T).exp()


def _importance(off_T: Tensor, cu_seqlens: Tensor, cfg: LossConfig) -> Tensor:
    """[T] uncapped; of a whole response, every token has the product of its tokens' weights."""
    if cfg.importance.startswith("token"):
        return off_T.exp()
    lengths_S = cu_seqlens.diff().long()
    sums_S = torch.segment_reduce(off_T, "sum", lengths=lengths_S, unsafe=True)
    return sums_S.repeat_interleave(lengths_S).exp()


def _capped(weight_T: Tensor, cfg: LossConfig) -> Tensor:
    if cfg.importance.endswith("truncate"):
        return weight_T.clamp(max=cfg.importance_cap)
    return torch.where(weight_T > cfg.importance_cap, 0.0, weight_T)


def on_host(counters: Counters) -> Counters:
    """To be sent to other processes."""
    return Counters(
        quotients={name: (s.cpu(), n.cpu()) for name, (s, n) in counters.quotients.items()},
        maxima={name: value.cpu() for name, value in counters.maxima.items()},
    )


def add_counters(parts: Sequence[Counters]) -> Counters:
    """Of several micro-batches under one configuration, hence with the same names."""
    return Counters(
        quotients={
            name: (
                torch.stack([part.quotients[name][0] for part in parts]).sum(),
                torch.stack([part.quotients[name][1] for part in parts]).sum(),
            )
            for name in parts[0].quotients
        },
        maxima={
            name: torch.stack([part.maxima[name] for part in parts]).amax()
            for name in parts[0].maxima
        },
    )


def to_metrics(counters: Counters) -> dict[str, float]:
    """Quotients divided, and `mismatch/ess`: the share of the sampled tokens that would tell as
    much without mismatch, (sum w)^2 / (n sum w^2) (Kong 1992)."""
    metrics = {name: maximum.item() for name, maximum in counters.maxima.items()}
    for name, (total, count) in counters.quotients.items():
        metrics[name] = total.item() / (count.item() or 1.0)
    square = metrics.pop("mismatch/weight_square_mean")
    mean = metrics["mismatch/weight_mean"]
    metrics["mismatch/ess"] = mean * mean / square if square else 1.0
    return metrics

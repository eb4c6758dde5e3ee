"""What do a micro-batch's tokens say of loss, gradient and counters, at once?   one operation

The loss of `loss.py` with all its counters. On a CPU it is computed by that file's formulas; on a
GPU by one launch (`policy_loss_triton.py`; two with an importance weight of whole responses) where
eager torch takes several dozen. The gradient comes with the loss: log-probs are all that it is
differentiable in, and the backward pass is a product.

Legend: T packed tokens, K counters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.loss import Counters, TokenTensors, summed, token_terms

PLAIN = ("loss", "loss/demonstrations", "tokens/trained")
MEANS = (
    "mismatch/logprob_abs_mean",
    "mismatch/kl_k1",
    "mismatch/kl_k3",
    "mismatch/weight_mean",
    "mismatch/weight_square_mean",
    "loss/clip_fraction",
    "importance/weight_mean",
    "importance/capped_rate",
    "loss/kl_reference",
)
"""Over sampled tokens; the operation gives sums."""
MAXIMA = ("mismatch/logprob_abs_max", "loss/ratio_max")
ZERO = "0"
TOTALS: tuple[str, ...] = (*PLAIN, *MEANS, *MAXIMA, ZERO)
"""What the K numbers are that come out, in float64; 0 where the loss has no such part. The last is
always 0: what counters divide sums by that are no means; making one would be a launch."""


def policy_loss(
    logprobs_T: Tensor, tokens: TokenTensors, cfg: LossConfig, *, denominator: float
) -> tuple[Tensor, Counters]:
    """As `loss.policy_loss`: L, differentiable once with respect to the log-probs, and counters.
    All tensors of one dtype, fp32 or float64."""
    loss, _, totals_K = torch.ops.megatron_srpo.policy_loss(
        logprobs_T, *arguments(tokens, cfg, denominator)
    )
    return loss, counters(totals_K, cfg)


def arguments(tokens: TokenTensors, cfg: LossConfig, denominator: float) -> tuple[Any, ...]:
    """Of the operation, behind the log-probs."""
    return (
        tokens.loss_weight_T,
        tokens.advantage_T,
        tokens.rollout_T,
        tokens.old_T,
        tokens.reference_T if cfg.kl_coef else None,
        tokens.cu_seqlens,
        cfg.surrogate,
        cfg.importance,
        cfg.clip_low,
        cfg.clip_high,
        cfg.kl_coef,
        cfg.importance_cap,
        denominator,
    )


def counters(totals_K: Tensor, cfg: LossConfig) -> Counters:
    """With their names, those that `cfg` makes worth watching."""
    total = dict(zip(TOTALS, totals_K.unbind(), strict=True))
    count, zero = total["tokens/trained"], total[ZERO]
    means = [name for name in MEANS if _is_watched(name, cfg)]
    return Counters(
        quotients={name: (total[name], zero) for name in PLAIN}
        | {name: (total[name], count) for name in means},
        maxima={name: total[name] for name in MAXIMA if _is_watched(name, cfg)},
    )


def _is_watched(name: str, cfg: LossConfig) -> bool:
    has_ratio = cfg.surrogate == "ppo"
    return {
        "loss/clip_fraction": has_ratio,
        "loss/ratio_max": has_ratio or cfg.updates_per_batch > 1,
        "loss/kl_reference": cfg.kl_coef > 0,
        "importance/weight_mean": cfg.importance != "none",
        "importance/capped_rate": cfg.importance != "none",
    }.get(name, True)


@torch.library.custom_op("megatron_srpo::policy_loss", mutates_args=())
def _policy_loss(
    logprobs_T: Tensor,
    loss_weight_T: Tensor,
    advantage_T: Tensor,
    rollout_T: Tensor,
    old_T: Tensor | None,
    reference_T: Tensor | None,
    cu_seqlens: Tensor,
    surrogate: str,
    importance: str,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    importance_cap: float,
    denominator: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, [T] d L / d log-prob, and the [K] float64 `TOTALS`; `kl_coef` is 0 without a reference"""
    cfg = LossConfig.model_validate(
        {
            "surrogate": surrogate,
            "importance": importance,
            "clip_low": clip_low,
            "clip_high": clip_high,
            "kl_coef": kl_coef,
            "importance_cap": importance_cap,
            "updates_per_batch": 2,  # the ratio counts, and is not looked at where there is none
        }
    )
    tokens = TokenTensors(
        loss_weight_T=loss_weight_T,
        advantage_T=advantage_T,
        rollout_T=rollout_T,
        old_T=old_T,
        reference_T=reference_T,
        cu_seqlens=cu_seqlens,
    )
    terms = token_terms(logprobs_T, tokens, cfg)
    loss, counted = summed(terms, tokens, denominator)
    found = {name: total for name, (total, _) in counted.quotients.items()} | counted.maxima
    zero = torch.zeros_like(found["loss"])
    totals_K = torch.stack([found.get(name, zero).double() for name in TOTALS])
    return loss, terms.slope_T / denominator, totals_K


@_policy_loss.register_kernel("cuda")
def _(logprobs_T: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from megatron_srpo.kernels import policy_loss_triton

    totals_K = logprobs_T.new_empty(len(TOTALS), dtype=torch.float64)
    side_by_side: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in others]
    loss, slope_T = policy_loss_triton.policy_loss(totals_K, logprobs_T.contiguous(), *side_by_side)
    return loss, slope_T, totals_K


@_policy_loss.register_fake
def _(logprobs_T: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logprobs_T.new_empty(()),
        torch.empty_like(logprobs_T),
        logprobs_T.new_empty(len(TOTALS), dtype=torch.float64),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_others = len(inputs) - 1
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, by_loss: Tensor, *_: Tensor) -> Any:
    (slope_T,) = ctx.saved_tensors
    return by_loss * slope_T, *[None] * ctx.num_others


_policy_loss.register_autograd(_differentiate, setup_context=_remember)

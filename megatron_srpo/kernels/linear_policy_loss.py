"""What do head and loss cost if done in one pass?   hidden states x weight -> loss, both gradients

    logits -> log-probs -> loss and its slopes -> d loss / d logits -> d / d hidden, d / d weight

`linear_logprob.py` followed by `policy_loss.py` computes logits twice: four matrix products. Here a
block of rows keeps its logits until its slopes are known: three. That works where a token's slope
follows from its own log-prob: any loss but those whose importance weight is a whole response's.
The gradients are there before anybody asks for them; the backward pass multiplies them, where they
are, by the loss's own, and so can be run once: autograd refuses the second time.

Blocks are equal, and as large as a workspace allows, since the weight's gradient is added up over
them in fp32: 2.9 GiB beside it for 152,064 tokens of 5120. Products at the device's own pace want
4096 rows a block or so, 2.3 GiB of logits: without tensor parallelism this cannot be both fast and
small; what saves memory is `linear_logprob.py`.

Under tensor parallelism one all-gather a block, as there, merged by all ranks alike; the gradient
of the hidden states is this rank's share.

Legend: N rows, V rows of this rank's weight, H hidden size, B rows of a block, C columns of a
chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels import rows
from megatron_srpo.kernels.policy_loss import MAXIMA, TOTALS, arguments, counters
from megatron_srpo.kernels.products import CHUNK, add_product, chunks, product, wide
from megatron_srpo.loss import Counters, TokenTensors

WORKSPACE = 2**30
"""Bytes of logits at a time: 1765 rows of 152,064 tokens in fp32."""


def linear_policy_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    tokens: TokenTensors,
    cfg: LossConfig,
    *,
    denominator: float,
    temperature: Tensor | float,
    first_id: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
    workspace: int = WORKSPACE,
    chunk: int = CHUNK,
) -> tuple[Tensor, Counters, Tensor, Tensor]:
    """The loss of `loss.policy_loss`, differentiable once with respect to hidden states and weight;
    its counters; [N], [N] log-prob of each target and entropy, nats, without a gradient.

    `tokens` speaks of these N rows. `workspace` is a bound in bytes. Everything else as in
    `linear_logprob`, but that all ranks of `group` hold equally many rows of the weight. Raises
    `ValueError` where the loss is not a sum over tokens.
    """
    if cfg.importance.startswith("sequence"):
        raise ValueError(
            f"importance={cfg.importance} weighs whole responses: the loss of a block of tokens "
            "is not known before those of others; take linear_logprob and policy_loss"
        )
    if not isinstance(temperature, Tensor):
        temperature = hidden_NH.new_full(targets_N.shape, temperature, dtype=wide(hidden_NH))
    row_bytes = len(weight_VH) * torch.finfo(wide(hidden_NH)).bits // 8
    num_blocks = max(1, math.ceil(len(hidden_NH) / max(1, workspace // row_bytes)))
    loss, logprob_N, entropy_N, totals_K, _, _ = torch.ops.megatron_srpo.linear_policy_loss(
        hidden_NH,
        weight_VH,
        targets_N,
        temperature,
        *arguments(tokens, cfg, denominator),
        first_id,
        len(weight_VH) if num_real is None else num_real,
        rows.name_of(group),
        max(1, math.ceil(len(hidden_NH) / num_blocks)),
        chunk,
    )
    return loss, counters(totals_K, cfg), logprob_N, entropy_N


@torch.library.custom_op("megatron_srpo::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    loss_weight_N: Tensor,
    advantage_N: Tensor,
    rollout_N: Tensor,
    old_N: Tensor | None,
    reference_N: Tensor | None,
    cu_seqlens: Tensor,
    surrogate: str,
    importance: str,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    importance_cap: float,
    denominator: float,
    first_id: int,
    num_real: int,
    group_name: str,
    block: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs, entropies, `policy_loss.TOTALS`, d loss / d hidden states and / d weight"""
    temperature_N = temperature_N.to(wide(hidden_NH)).contiguous()
    by_hidden_NH = torch.zeros_like(hidden_NH, dtype=temperature_N.dtype)
    by_weight_VH = torch.zeros_like(weight_VH, dtype=temperature_N.dtype)
    logprob_N, entropy_N = torch.empty_like(temperature_N), torch.empty_like(temperature_N)
    loss, totals_K = temperature_N.new_zeros(()), temperature_N.new_zeros(len(TOTALS)).double()
    known = loss_weight_N, advantage_N, rollout_N, old_N, reference_N
    how = surrogate, importance, clip_low, clip_high, kl_coef, importance_cap, denominator
    pieces = list(chunks(weight_VH, num_real, chunk))
    for first in range(0, len(hidden_NH), block):
        here = slice(first, first + block)
        hidden_BH, temperature_B = hidden_NH[here], temperature_N[here]
        targets_B = targets_N[here] - first_id
        logits, stats_4B = _logits(hidden_BH, pieces, targets_B, temperature_B)
        whole = rows.whole(stats_4B, temperature_B, group_name)
        logprob_N[here], entropy_N[here], softmax_3B = whole
        block_loss, slope_B, block_totals_K = torch.ops.megatron_srpo.policy_loss(
            logprob_N[here], *(x if x is None else x[here] for x in known), cu_seqlens, *how
        )
        loss += block_loss
        _add(totals_K, block_totals_K)
        by_output_2B = torch.stack([slope_B, torch.zeros_like(slope_B)])
        how_to_descend = targets_B, temperature_B, softmax_3B, by_output_2B
        _add_gradients(by_hidden_NH[here], by_weight_VH, hidden_BH, pieces, logits, *how_to_descend)
    by_hidden_NH, by_weight_VH = by_hidden_NH.to(hidden_NH.dtype), by_weight_VH.to(weight_VH.dtype)
    return loss, logprob_N, entropy_N, totals_K, by_hidden_NH, by_weight_VH


def _logits(
    hidden_BH: Tensor,
    pieces: Sequence[tuple[int, Tensor]],
    targets_B: Tensor,
    temperature_B: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Of each chunk of the vocabulary, and the statistics of all."""
    logits: list[Tensor] = []
    stats_4B = rows.nothing_seen(len(hidden_BH), like=temperature_B)
    for start, weight_CH in pieces:
        logits_BC = product(hidden_BH, weight_CH.T)
        rows.functions_for(logits_BC).absorb(stats_4B, logits_BC, targets_B - start, temperature_B)
        logits.append(logits_BC)
    return logits, stats_4B


def _add_gradients(
    by_hidden_BH: Tensor,
    by_weight_VH: Tensor,
    hidden_BH: Tensor,
    pieces: Sequence[tuple[int, Tensor]],
    logits: list[Tensor],
    targets_B: Tensor,
    temperature_B: Tensor,
    softmax_3B: Tensor,
    by_output_2B: Tensor,
) -> None:
    """Of a block. Takes the logits off their list: none is there when the next block's are made."""
    for start, weight_CH in pieces:
        by_logits_BC = rows.functions_for(logits[0]).gradients(
            logits.pop(0),
            targets_B - start,
            temperature_B,
            softmax_3B,
            by_output_2B,
            weight_CH.dtype,
        )
        add_product(by_hidden_BH, by_logits_BC, weight_CH)
        add_product(by_weight_VH[start : start + len(weight_CH)], by_logits_BC.T, hidden_BH)


def _add(totals_K: Tensor, more_K: Tensor) -> None:
    """Sums are added; what is not a sum is a maximum."""
    num_sums = TOTALS.index(MAXIMA[0])
    totals_K[:num_sums] += more_K[:num_sums]
    totals_K[num_sums:] = torch.maximum(totals_K[num_sums:], more_K[num_sums:])


@_linear_policy_loss.register_fake
def _(hidden_NH: Tensor, weight_VH: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = wide(hidden_NH)
    return (
        hidden_NH.new_empty((), dtype=dtype),
        hidden_NH.new_empty(len(hidden_NH), dtype=dtype),
        hidden_NH.new_empty(len(hidden_NH), dtype=dtype),
        hidden_NH.new_empty(len(TOTALS), dtype=torch.float64),
        torch.empty_like(hidden_NH),
        torch.empty_like(weight_VH),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_others = len(inputs) - 2
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, by_loss: Tensor, *_: Tensor) -> Any:
    by_hidden_NH, by_weight_VH = ctx.saved_tensors
    return by_hidden_NH.mul_(by_loss), by_weight_VH.mul_(by_loss), *[None] * ctx.num_others


_linear_policy_loss.register_autograd(_differentiate, setup_context=_remember)

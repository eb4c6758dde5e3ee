"""What does a policy's head say of its targets?   hidden states x weight -> log-prob and entropy

    logits = hidden W^T / temperature    never whole: in chunks of the vocabulary

The forward pass keeps four numbers a row (`rows.py`); the backward pass computes each chunk of
logits again, makes its gradient of it, and adds that to those of hidden states and weight. Beside
inputs and outputs that takes a few chunks [N, chunk] of memory, whatever the vocabulary's size.

Under tensor parallelism each rank holds some rows of W. The gradient of the hidden states is this
rank's share: whoever handed them out sums it up. The gradient of the weight may go right to where
it is added up over micro-batches (`main_grad`), in the dtype of that.

Logits are products in the inputs' dtype with sums in fp32 (float64 inputs: float64), never
rounded; so is everything behind them, but for d loss / d logits, which enters its products
rounded to the weight's dtype. Legend: N rows, V rows of this rank's weight, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.kernels import rows
from megatron_srpo.kernels.products import (
    CHUNK,
    add_product,
    chunks,
    product,
    wide,
    write_product,
)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: Tensor | float,
    first_id: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
    main_grad_VH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[N], [N] log-prob of each target and entropy, nats, in fp32 (float64 of float64 inputs);
    both differentiable with respect to hidden states and weight.

    `targets_N` are token ids. `weight_VH` holds the ids from `first_id` on, and of its rows only
    the first `num_real` are tokens that exist. `temperature` is one, or [N]. The ranks of `group`
    hold the rest of the vocabulary: a collective, of equally many rows on each. With a
    `main_grad_VH` the backward pass adds the weight's gradient to it, and gives 0 as that gradient.
    """
    if not isinstance(temperature, Tensor):
        temperature = hidden_NH.new_full(targets_N.shape, temperature, dtype=wide(hidden_NH))
    logprob_N, entropy_N, _ = torch.ops.megatron_srpo.linear_logprob(
        hidden_NH,
        weight_VH,
        targets_N,
        temperature,
        first_id,
        len(weight_VH) if num_real is None else num_real,
        rows.name_of(group),
        chunk,
        main_grad_VH,
    )
    return logprob_N, entropy_N


@torch.library.custom_op("megatron_srpo::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    first_id: int,
    num_real: int,
    group_name: str,
    chunk: int,
    main_grad_VH: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy, and what the backward pass needs: [3, N] m, log s, entropy"""
    temperature_N = temperature_N.to(wide(hidden_NH)).contiguous()
    stats_4N = rows.nothing_seen(len(targets_N), like=temperature_N)
    for start, weight_CH in chunks(weight_VH, num_real, chunk):
        logits_NC = product(hidden_NH, weight_CH.T)
        targets = targets_N - first_id - start
        rows.functions_for(logits_NC).absorb(stats_4N, logits_NC, targets, temperature_N)
        del logits_NC  # or the next chunk would be made beside it
    return rows.whole(stats_4N, temperature_N, group_name)


@_linear_logprob.register_fake
def _(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, dtype = len(targets_N), wide(hidden_NH)
    return (
        hidden_NH.new_empty(num_rows, dtype=dtype),
        hidden_NH.new_empty(num_rows, dtype=dtype),
        hidden_NH.new_empty(3, num_rows, dtype=dtype),
    )


@torch.library.custom_op("megatron_srpo::linear_logprob_backward", mutates_args={"main_grad_VH"})
def _backward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor,
    softmax_3N: Tensor,
    by_output_2N: Tensor,
    first_id: int,
    num_real: int,
    chunk: int,
    main_grad_VH: Tensor | None,  # without a default, which torch 2.11 does not find: IndexError
) -> tuple[Tensor, Tensor]:
    """d loss / d hidden states, through this rank's columns, and / d weight"""
    temperature_N = temperature_N.to(softmax_3N.dtype).contiguous()
    by_hidden_NH = torch.zeros_like(hidden_NH, dtype=softmax_3N.dtype)
    by_weight_VH = torch.empty_like(weight_VH)
    by_weight_VH[num_real if main_grad_VH is None else 0 :] = 0
    for start, weight_CH in chunks(weight_VH, num_real, chunk):
        logits_NC = product(hidden_NH, weight_CH.T)
        by_logits_NC = rows.functions_for(logits_NC).gradients(
            logits_NC,
            targets_N - first_id - start,
            temperature_N,
            softmax_3N,
            by_output_2N,
            weight_VH.dtype,
        )
        del logits_NC  # each is gone before the next large tensor is made
        add_product(by_hidden_NH, by_logits_NC, weight_CH)
        here = slice(start, start + len(weight_CH))
        if main_grad_VH is None:
            write_product(by_weight_VH[here], by_logits_NC.T, hidden_NH)
        else:
            add_product(main_grad_VH[here], by_logits_NC.T, hidden_NH)
        del by_logits_NC
    return by_hidden_NH.to(hidden_NH.dtype), by_weight_VH


@_backward.register_fake
def _(hidden_NH: Tensor, weight_VH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_NH), torch.empty_like(weight_VH)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_id, num_real, _, chunk, main_grad_VH = inputs
    ctx.save_for_backward(*tensors, output[2])
    # Not saved for backward: other micro-batches change it in between, as they should.
    ctx.others = first_id, num_real, chunk, main_grad_VH
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, by_logprob_N: Tensor, by_entropy_N: Tensor, _: Tensor) -> Any:
    by_hidden_NH, by_weight_VH = torch.ops.megatron_srpo.linear_logprob_backward(
        *ctx.saved_tensors, torch.stack([by_logprob_N, by_entropy_N]), *ctx.others
    )
    return by_hidden_NH, by_weight_VH, *[None] * 7


_linear_logprob.register_autograd(_differentiate, setup_context=_remember)

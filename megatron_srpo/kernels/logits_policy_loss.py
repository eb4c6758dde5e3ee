"""What policy loss do logits have, and what gradient?   logits -> loss and d loss / d logits

For logits that exist anyway and hold the whole vocabulary: the forward pass makes d loss / d logits
with the loss, the backward pass hands it out. On GPUs whose blocks form clusters (sm_90, sm_100),
and with nvcc, one CUDA kernel (`logits_policy_loss.cu`) reads each logit once and writes each
gradient once, in time for 2/3 of what two passes move; Triton cannot say it, whose programs share
no memory. Elsewhere `logprob_stats`, `policy_loss` and the former's backward pass do the same.

The loop never has logits (`linear_logprob.py`), so nothing in it calls this operation: it is for
whoever has them. Legend: T rows, V columns, K counters.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels import (
    logprob_stats,  # noqa: F401  (its operations are called by name)
    nvcc,
)
from megatron_srpo.kernels.policy_loss import arguments, counters
from megatron_srpo.loss import Counters, TokenTensors

SOURCE = Path(__file__).with_suffix(".cu")
MAX_CLUSTER = 8
BLOCK_BYTES = 40_000
"""Of a row in a block, while the cluster can still grow: several blocks then share a
multiprocessor, and one reads while another writes."""
SHARED_BYTES = 227 * 1024 - 1024
"""Of a row in a block, at most: what sm_90 and sm_100 have, less what the kernel needs itself."""


def logits_policy_loss(
    logits_TV: Tensor,
    target_ids_T: Tensor,
    tokens: TokenTensors,
    cfg: LossConfig,
    *,
    temperature: Tensor | float,
    denominator: float,
    num_real: int | None = None,
) -> tuple[Tensor, Counters, Tensor, Tensor]:
    """Loss and counters as `loss.policy_loss` has them, [T] log-prob of each target and [T]
    entropy, nats. Only the loss is differentiable, once, and only with respect to the logits.

    In fp32 (float64 of float64 logits). Tokens without a loss weight are not read: their log-prob
    and entropy are 0, and so is the gradient. Only the first `num_real` columns are tokens that
    exist. `temperature` is one, or [T]. Importance weights of whole responses need all log-probs
    before the first coefficient: `ValueError`.
    """
    if cfg.importance.startswith("sequence"):
        raise ValueError(f"importance {cfg.importance}: a row of logits does not know its response")
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        temperature = logits_TV.new_full(target_ids_T.shape, temperature, dtype=wide)
    loss, totals_K, logprob_T, entropy_T, _ = torch.ops.megatron_srpo.logits_policy_loss(
        logits_TV,
        target_ids_T,
        temperature.to(wide),
        logits_TV.shape[1] if num_real is None else num_real,
        *arguments(tokens, cfg, denominator),
    )
    return loss, counters(totals_K, cfg), logprob_T, entropy_T


@torch.library.custom_op("megatron_srpo::logits_policy_loss", mutates_args=())
def _logits_policy_loss(
    logits_TV: Tensor,
    target_ids_T: Tensor,
    temperature_T: Tensor,
    num_real: int,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, totals of the counters, log-probs, entropies, d loss / d logits"""
    per_token = loss_weight_T, advantage_T, rollout_T, old_T, reference_T
    how = surrogate, importance, clip_low, clip_high, kl_coef, importance_cap, denominator
    library = library_for(logits_TV)
    if library is None:
        inputs = logits_TV, target_ids_T, temperature_T
        return _twice_read(*inputs, num_real, (*per_token, cu_seqlens, *how))
    found = launch(library, logits_TV, target_ids_T, temperature_T, num_real, per_token, how)
    logprob_T, entropy_T, by_logits_TV = found
    loss, _, totals_K = torch.ops.megatron_srpo.policy_loss(logprob_T, *per_token, cu_seqlens, *how)
    return loss, totals_K, logprob_T, entropy_T, by_logits_TV


def _twice_read(
    logits_TV: Tensor,
    target_ids_T: Tensor,
    temperature_T: Tensor,
    num_real: int,
    loss_arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ops, nothing_T = torch.ops.megatron_srpo, torch.zeros_like(temperature_T)
    rows_N = loss_arguments[0].nonzero()[:, 0]
    inputs = logits_TV, rows_N, target_ids_T[rows_N], temperature_T[rows_N]
    logprob_N, entropy_N, softmax_3N = ops.logprob_stats(*inputs, 0, num_real, "")
    logprob_T = nothing_T.index_copy(0, rows_N, logprob_N)
    loss, by_logprob_T, totals_K = ops.policy_loss(logprob_T, *loss_arguments)
    by_output_2N = torch.stack([by_logprob_T[rows_N], torch.zeros_like(entropy_N)])
    by_logits_TV = ops.logprob_stats_backward(*inputs, softmax_3N, by_output_2N, 0, num_real)
    return loss, totals_K, logprob_T, nothing_T.index_copy(0, rows_N, entropy_N), by_logits_TV


@_logits_policy_loss.register_fake
def _(
    logits_TV: Tensor, target_ids_T: Tensor, temperature_T: Tensor, num_real: int, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprob_T, entropy_T = (torch.empty_like(temperature_T) for _ in range(2))
    loss, _, totals_K = torch.ops.megatron_srpo.policy_loss(logprob_T, *others)
    return loss, totals_K, logprob_T, entropy_T, logits_TV.new_empty(logits_TV.shape)


# --- the gradient, made by the forward pass ---


@torch.library.custom_op("megatron_srpo::scale_", mutates_args=("x",))
def _scale(x: Tensor, factor: Tensor) -> None:
    """A loss is nearly always differentiated as it is: the kernel looks at the factor first, and
    touches nothing if it is 1."""
    library = library_for(x)
    if library is None:
        x.mul_(factor.to(x.dtype))
    elif x.numel():
        launch_scale(library, x, factor)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_others = len(inputs) - 1
    ctx.save_for_backward(output[4])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, by_loss: Tensor, *_: Any) -> Any:
    (by_logits_TV,) = ctx.saved_tensors
    autograd: Any = torch._C._autograd  # type: ignore[reportAttributeAccessIssue]
    is_needed_again = autograd._get_current_graph_task_keep_graph()
    is_traced = type(by_logits_TV) is not Tensor
    if is_needed_again or is_traced:
        by_logits_TV = by_logits_TV * by_loss.to(by_logits_TV.dtype)
    else:
        torch.ops.megatron_srpo.scale_(by_logits_TV, by_loss)
    return by_logits_TV, *[None] * ctx.num_others


_logits_policy_loss.register_autograd(_differentiate, setup_context=_remember)


# --- CUDA ---


class CudaArguments(ctypes.Structure):
    """`Arguments` of the CUDA source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("targets", "temperatures", "weights", "advantages")),
        *((name, ctypes.c_void_p) for name in ("rollout", "old", "reference")),
        *((name, ctypes.c_void_p) for name in ("logprobs", "entropies", "logits", "by_logits")),
        *((name, ctypes.c_int64) for name in ("num_rows", "row_stride")),
        *((name, ctypes.c_int32) for name in ("num_columns", "num_real", "is_bfloat16", "is_ppo")),
        ("importance", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("log_low", "log_high", "kl_coef", "cap", "scale")),
    )


IMPORTANCE = ("none", "token_truncate", "token_mask")
"""As the CUDA source counts them."""


def library_for(logits_TV: Tensor) -> ctypes.CDLL | None:
    """What serves these logits in CUDA, built if need be; None: the other operations do."""
    if not logits_TV.is_cuda or logits_TV.dtype not in (torch.float32, torch.bfloat16):
        return None
    row_bytes = logits_TV.shape[-1] * logits_TV.element_size()
    major, minor = torch.cuda.get_device_capability(logits_TV.device)
    if major not in (9, 10) or row_bytes > MAX_CLUSTER * SHARED_BYTES:
        return None
    return nvcc.load(SOURCE, f"{major}{minor}a")


def cluster_size(row_bytes: int) -> int:
    """How many blocks share a row."""
    size = 1
    while size < MAX_CLUSTER and row_bytes > size * BLOCK_BYTES:
        size *= 2
    return size


def launch(
    library: ctypes.CDLL,
    logits_TV: Tensor,
    target_ids_T: Tensor,
    temperature_T: Tensor,
    num_real: int,
    per_token: tuple[Tensor | None, ...],
    how: tuple[str, str, float, float, float, float, float],
    *,
    num_blocks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies, d loss / d logits; a row in `num_blocks` blocks."""
    num_rows, num_columns = logits_TV.shape
    logits_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    by_logits_TV = logits_TV.new_empty(logits_TV.shape)
    logprob_T, entropy_T = (torch.empty_like(temperature_T) for _ in range(2))
    floats = (temperature_T, *per_token)
    targets_T = target_ids_T.to(torch.int64).contiguous()
    kept = [targets_T, *(None if x is None else _floats(x) for x in floats)]
    everything = (*kept, logprob_T, entropy_T, logits_TV, by_logits_TV)
    surrogate, importance, clip_low, clip_high, kl_coef, cap, denominator = how
    arguments = CudaArguments(
        *(None if x is None else x.data_ptr() for x in everything),
        num_rows,
        logits_TV.stride(0),
        num_columns,
        num_real,
        logits_TV.dtype == torch.bfloat16,
        surrogate == "ppo",
        IMPORTANCE.index(importance),
        math.log1p(-clip_low),
        math.log1p(clip_high),
        kl_coef,
        cap,
        1 / denominator,
    )
    num_blocks = num_blocks or cluster_size(num_columns * logits_TV.element_size())
    assert num_rows * num_blocks < 2**31, f"{num_rows} rows are more than one grid has"
    if num_rows and num_columns:
        error = library.logits_policy_loss_launch(
            ctypes.byref(arguments), num_blocks, *_place(logits_TV)
        )
        assert not error, f"logits_policy_loss: {_words(library, error)}"
    return logprob_T, entropy_T, by_logits_TV


def launch_scale(library: ctypes.CDLL, x: Tensor, factor: Tensor) -> None:
    """x *= factor, a number on x's device."""
    factor = _floats(factor)
    error = library.scale_launch(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(factor.data_ptr()),
        ctypes.c_int64(x.numel()),
        int(x.dtype == torch.bfloat16),
        *_place(x),
    )
    assert not error, f"scale: {_words(library, error)}"


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _place(x: Tensor) -> tuple[int, ctypes.c_void_p]:
    """Device and stream, of tensors on a CPU none."""
    if not x.is_cuda:
        return 0, ctypes.c_void_p(None)
    return x.device.index, ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)


def _words(library: ctypes.CDLL, error: int) -> str:
    library.error_name.restype = ctypes.c_char_p
    return library.error_name(error).decode()

"""What must Megatron be told of FP8, and how is a weight read and written that is held in it?

`Fp8Config` -> fields of Megatron's configs (0.16.1), each under the name that it has there

A weight held in FP8 (`fp8.param_gather`) is a tensor of Transformer Engine's that says bfloat16 of
itself. Its fp32 master is made, when the optimizer is, of a bf16 copy in host memory that it had
when it was made (`get_high_precision_init_val`), not of what it holds by then: without `write`, the
first step would undo the loading of a folder.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.fp8_utils import dequantize_fp8_tensor, get_fp8_align_size, is_float8tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_srpo.config_precision import Fp8Config

FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Of one scale per tensor, gradients have e5m2's range; with one per block e4m3's suffices
(Transformer Engine's own defaults, common/recipe)."""
HISTORY: dict[str, Any] = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
"""Of delayed scaling: its defaults there; Megatron's are the last value alone."""


def model_fields(fp8: Fp8Config) -> dict[str, Any]:
    """Of TransformerConfig."""
    if fp8.recipe == "none":
        return {}
    return {
        "fp8": FORMATS[fp8.recipe],
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "first_last_layers_bf16": fp8.first_last_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_last_bf16,
        "num_layers_at_end_in_bf16": fp8.first_last_bf16,
        **(HISTORY if fp8.recipe == "delayed" else {}),
    }


def gather_fields(fp8: Fp8Config) -> dict[str, Any]:
    """Of DistributedDataParallelConfig."""
    return {"fp8_param_gather": fp8.param_gather, **_buffer(fp8)}


def optimizer_fields(fp8: Fp8Config) -> dict[str, Any]:
    """Of OptimizerConfig: how it writes weights depends on how they are held."""
    held = fp8.recipe if fp8.param_gather else None
    return {"fp8_recipe": held, **_buffer(fp8)}


def _buffer(fp8: Fp8Config) -> dict[str, Any]:
    """Weights in MXFP8 cannot be moved into a buffer of their own (Transformer Engine,
    `replace_raw_data`): they travel in bf16, through that of the gradients."""
    shares = fp8.param_gather and fp8.recipe == "mxfp8"
    return {"reuse_grad_buf_for_mxfp8_param_ag": shares}


def token_multiple(config: TransformerConfig) -> int:
    """Divides the number of tokens that a process multiplies at a time."""
    return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1  # type: ignore[arg-type]


def plain(weight: Tensor) -> Tensor:
    """As it multiplies, in bf16 if it is held in FP8; without its gradient."""
    return dequantize_fp8_tensor(weight.detach()) if is_float8tensor(weight) else weight.detach()


@torch.no_grad()
def write(weight: torch.nn.Parameter, value: Tensor) -> None:
    """Before the optimizer is made."""
    weight.copy_(value)
    if is_float8tensor(weight):
        held: Any = weight
        held.get_high_precision_init_val().copy_(value)


def make_plain(sharded_state: dict[str, Any]) -> None:
    """What a checkpoint holds of weights, whatever they are held in; in place."""
    force_all_tensors_to_non_fp8(sharded_state)

"""Megatron's layers as a family's models need them.   family, config.json, backend -> layer specs

Norms in plain torch for local layers, where Megatron's own refuses sequence parallelism, and the
two that OLMo has and neither backend.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_srpo.engines.megatron.attention import PackedCausalAttention, RotarySelfAttention
from megatron_srpo.engines.megatron.backend import Backend
from megatron_srpo.engines.megatron.names import Family
from megatron_srpo.engines.megatron.positions import Positions


class RMSNorm(torch.nn.RMSNorm):
    """Replicated over tensor parallel ranks, each of which sees part of the tokens: marked, so
    that Megatron adds their gradients up."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark: Any = self.weight
        mark.sequence_parallel = config.sequence_parallel


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads together (OLMo 2, arXiv 2501.00656, section 2.1), each tensor
    parallel rank holding some of them.

    The weight is whole on every rank, and gets its own heads' gradient there; Megatron adds these
    up, as for every `q_layernorm` and `k_layernorm` (distributed/finalize_model_grads.py).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int
    ) -> None:
        super().__init__()
        self.eps, self.num_heads = eps, num_heads
        self.weight = torch.nn.Parameter(
            torch.ones(num_heads * hidden_size, dtype=config.params_dtype)
        )
        self._group: Any = parallel_state.get_tensor_model_parallel_group()

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, heads of this rank, head size], same shape back."""
        wide = x.float()
        total = _SumOverRanks.apply(wide.square().sum((-2, -1), keepdim=True), self._group)
        rank, size = self._group.rank(), self._group.size()
        weight = self.weight.view(self.num_heads, -1).chunk(size)[rank]
        scale = torch.rsqrt(total / self.weight.numel() + self.eps)
        return (wide * scale * weight.float()).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """What every rank sees is the sum, so every rank's gradient counts for each summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class NormThenAdd(torch.nn.Module):
    """residual + norm(x): fills the spec slot of Megatron's bias-dropout-add, where there is
    neither bias nor dropout."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., torch.nn.Module]) -> None:
        super().__init__()
        self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        def add(x_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
            return residual + self.norm(x_with_bias[0])

        return add


def block_spec(
    family: Family,
    config: TransformerConfig,
    positions: list[Positions],
    vp_stage: int | None,
    backend: Backend,
) -> TransformerBlockSubmodules:
    """The layers of this stage (of this chunk of it) and the final norm."""
    first = get_transformer_layer_offset(config, vp_stage)
    stage = range(first, first + get_num_layers_to_build(config, vp_stage))
    layer_spec = _engine_layer if backend.is_engine else _local_layer
    specs: Any = TransformerBlockSubmodules
    return specs(
        layer_specs=[layer_spec(family, config, positions[index], index) for index in stage],
        layer_norm=TENorm if backend.is_engine else RMSNorm,
    )


def _local_layer(
    family: Family, config: TransformerConfig, positions: Positions, index: int
) -> ModuleSpec:
    num_experts = _num_experts(config, index)
    spec = get_gpt_layer_local_spec(num_experts=num_experts, normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.self_attention.submodules.core_attention = PackedCausalAttention
    return _of_family(spec, family, config, positions, norm=RMSNorm)


def _engine_layer(
    family: Family, config: TransformerConfig, positions: Positions, index: int
) -> ModuleSpec:
    """Transformer Engine's. Its checkpoints have the same names as those of local layers."""
    num_experts = _num_experts(config, index)
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=num_experts is not None
    )
    layer: Any = spec.submodules
    if num_experts:  # a norm of its own stands before a router
        layer.sharded_state_dict_keys_map = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if family.norms == "post":  # no norm is left to be part of these
        layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        layer.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    return _of_family(spec, family, config, positions, norm=TENorm)


def _num_experts(config: TransformerConfig, index: int) -> int | None:
    frequency: Any = config.moe_layer_freq
    return config.num_moe_experts if config.num_moe_experts and frequency[index] else None


def _of_family(
    spec: ModuleSpec,
    family: Family,
    config: TransformerConfig,
    positions: Positions,
    *,
    norm: Callable[..., torch.nn.Module],
) -> ModuleSpec:
    """The layer with what distinguishes the family's."""
    layer: Any = spec.submodules
    if family.norms == "post":
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        parameters = {"config": config, "norm": norm}
        layer.self_attn_bda = ModuleSpec(module=NormThenAdd, params=parameters)
        layer.mlp_bda = deepcopy(layer.self_attn_bda)
    attention = layer.self_attention
    attention.module = RotarySelfAttention
    attention.params = {**attention.params, "positions": positions}
    attention.submodules.q_layernorm = _head_norm(family, config.num_attention_heads, norm)
    attention.submodules.k_layernorm = _head_norm(family, config.num_query_groups, norm)
    return spec


def _head_norm(
    family: Family, num_heads: int | None, norm: Callable[..., torch.nn.Module]
) -> ModuleSpec | Callable[..., torch.nn.Module]:
    if family.qk_norm == "none":
        return IdentityOp
    if family.qk_norm == "head":
        return norm
    return ModuleSpec(module=AllHeadsNorm, params={"num_heads": num_heads})

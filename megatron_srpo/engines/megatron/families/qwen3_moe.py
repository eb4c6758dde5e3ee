"""Qwen3-MoE: Qwen3 whose MLP is, in most layers, a router and its experts."""

from __future__ import annotations

from megatron_srpo.engines.megatron.families import qwen3
from megatron_srpo.engines.megatron.names import Family

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    qk_norm="head",
    layer={
        **qwen3.FAMILY.layer,  # a dense layer's
        "mlp.router.weight": ("copy", ("mlp.gate.weight",)),
        "mlp.experts.local_experts.{}.linear_fc1.weight": (
            "gate_up",
            ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        ),
        "mlp.experts.local_experts.{}.linear_fc2.weight": (
            "copy",
            ("mlp.experts.{}.down_proj.weight",),
        ),
    },
)

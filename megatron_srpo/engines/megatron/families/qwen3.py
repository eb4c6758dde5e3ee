"""Qwen3: Llama with an RMSNorm of every query and key head."""

from __future__ import annotations

from megatron_srpo.engines.megatron.families import llama
from megatron_srpo.engines.megatron.names import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    qk_norm="head",
    layer={
        **llama.FAMILY.layer,
        "self_attention.q_layernorm.weight": ("copy", ("self_attn.q_norm.weight",)),
        "self_attention.k_layernorm.weight": ("copy", ("self_attn.k_norm.weight",)),
    },
)

"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from megatron_srpo.engines.megatron.families import llama
from megatron_srpo.engines.megatron.names import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    layer={
        **llama.FAMILY.layer,
        "self_attention.linear_qkv.bias": (
            "qkv",
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        ),
    },
)

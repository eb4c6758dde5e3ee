"""Qwen2 and Qwen2.5: RMSNorm, SwiGLU, rotary positions, biases on q, k and v only."""

from __future__ import annotations

from megatron_srpo.engines.megatron.names import Family

QWEN2 = Family(
    model_types=("qwen2",),
    qkv_bias=True,
    layer={
        "input_layernorm.weight": ("copy", ("input_layernorm.weight",)),
        "self_attention.linear_qkv.weight": (
            "qkv",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ),
        "self_attention.linear_qkv.bias": (
            "qkv",
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        ),
        "self_attention.linear_proj.weight": ("copy", ("self_attn.o_proj.weight",)),
        "pre_mlp_layernorm.weight": ("copy", ("post_attention_layernorm.weight",)),
        "mlp.linear_fc1.weight": ("concat", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        "mlp.linear_fc2.weight": ("copy", ("mlp.down_proj.weight",)),
    },
)

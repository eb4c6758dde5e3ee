"""Llama 2 and 3: RMSNorm, SwiGLU, rotary positions (llama3 scaling), no biases."""

from __future__ import annotations

from megatron_srpo.engines.megatron.names import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer={
        "input_layernorm.weight": ("copy", ("input_layernorm.weight",)),
        "self_attention.linear_qkv.weight": (
            "qkv",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ),
        "self_attention.linear_proj.weight": ("copy", ("self_attn.o_proj.weight",)),
        "pre_mlp_layernorm.weight": ("copy", ("post_attention_layernorm.weight",)),
        "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        "mlp.linear_fc2.weight": ("copy", ("mlp.down_proj.weight",)),
    },
)

"""OLMo 2: normalizes what leaves attention and MLP, and queries and keys over all heads."""

from __future__ import annotations

from megatron_srpo.engines.megatron.names import Family

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    qk_norm="full",
    norms="post",
    layer={
        "self_attention.linear_qkv.weight": (
            "qkv",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ),
        "self_attention.q_layernorm.weight": ("copy", ("self_attn.q_norm.weight",)),
        "self_attention.k_layernorm.weight": ("copy", ("self_attn.k_norm.weight",)),
        "self_attention.linear_proj.weight": ("copy", ("self_attn.o_proj.weight",)),
        "self_attn_bda.norm.weight": ("copy", ("post_attention_layernorm.weight",)),
        "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        "mlp.linear_fc2.weight": ("copy", ("mlp.down_proj.weight",)),
        "mlp_bda.norm.weight": ("copy", ("post_feedforward_layernorm.weight",)),
    },
)

"""A Hugging Face folder -> Megatron's GPTModel with its weights: this rank's shard of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_srpo.engines.megatron.attention import PackedCausalAttention
from megatron_srpo.engines.megatron.families import family_of, rope_theta
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.names import Family
from megatron_srpo.engines.megatron.weights import load_hf
from megatron_srpo.hf_folder import head_size, num_kv_heads, read_config


def is_tied(folder: Path) -> bool:
    """Input embedding and output head are one tensor."""
    return bool(read_config(folder).get("tie_word_embeddings", False))


def build_model(folder: Path, mesh: Mesh, dtype: torch.dtype) -> GPTModel:
    """Collective; with the folder's weights. Raises `InputError` if they do not fit its config."""
    model = empty_model(folder, mesh, dtype)
    load_hf(model, folder, family_of(folder), mesh)
    return model


def empty_model(folder: Path, mesh: Mesh, dtype: torch.dtype) -> GPTModel:
    """Memory as it comes; none at all under `torch.device("meta")`."""
    hf, family = read_config(folder), family_of(folder)
    config = transformer_config(hf, family, mesh, dtype)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.self_attention.submodules.core_attention = PackedCausalAttention
    return GPTModel(
        config,
        spec,
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=mesh.pp_rank == 0,
        post_process=mesh.is_last_stage,
        position_embedding_type="rope",
        rotary_base=int(rope_theta(hf)),
        share_embeddings_and_output_weights=is_tied(folder),
    )


def transformer_config(
    hf: dict[str, Any], family: Family, mesh: Mesh, dtype: torch.dtype
) -> TransformerConfig:
    """Fusions that need CUDA extensions are off; `calculate_per_token_loss`: see `learner.py`."""
    return TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=num_kv_heads(hf),
        kv_channels=head_size(hf),
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        pipeline_dtype=dtype,
        # Stages tell each other the length of each packed micro-batch.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # which the line above demands, experts or not
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Megatron marks a parameter as sharded where it initializes it; an unmarked one would count
        # once in the gradient norm. The weights themselves are the folder's.
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=torch.get_default_device().type == "meta"
        or not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        calculate_per_token_loss=True,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight

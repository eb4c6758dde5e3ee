"""A Hugging Face folder -> Megatron's GPTModel with its weights: this rank's shard of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_srpo.engines.megatron.backend import LOCAL, Backend
from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.fp8 import model_fields
from megatron_srpo.engines.megatron.head import Unprojected
from megatron_srpo.engines.megatron.layers import block_spec
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.names import Family, padded_size
from megatron_srpo.engines.megatron.positions import Positions, positions_of
from megatron_srpo.hf_config import completed_config, head_size, num_kv_heads
from megatron_srpo.hf_folder import read_config


def is_tied(folder: Path) -> bool:
    """Input embedding and output head are one tensor."""
    return bool(read_config(folder).get("tie_word_embeddings", False))


def build_chunks(
    folder: Path, mesh: Mesh, dtype: torch.dtype, backend: Backend = LOCAL
) -> list[GPTModel]:
    """This stage's parts of the model, weights still to be loaded: one, or `parallel.vpp` of them
    if the pipeline is interleaved. What comes out of the last are hidden states (`head.py`)."""
    hf, family, positions = completed_config(folder), family_of(folder), positions_of(folder)
    config = TransformerConfig(
        **_model(hf, family, dtype),
        **_window(positions),
        **_experts(hf),
        **_layout(mesh, dtype),
        **_fused(backend),
        **model_fields(backend.fp8),
    )
    last = mesh.parallel.vpp - 1
    chunk_of: Any = GPTModel
    chunks = [
        chunk_of(
            config,
            block_spec(family, config, positions, chunk, backend),
            vocab_size=padded_size(hf["vocab_size"]),
            max_sequence_length=hf["max_position_embeddings"],
            pre_process=mesh.pp_rank == 0 and chunk in (None, 0),
            post_process=mesh.is_last_stage and chunk in (None, last),
            position_embedding_type="none",  # each layer has its own: `attention.py`
            share_embeddings_and_output_weights=is_tied(folder),
            vp_stage=chunk,
        )
        for chunk in (range(last + 1) if last else [None])
    ]
    if mesh.is_last_stage:
        chunks[-1].output_layer = Unprojected(chunks[-1].output_layer)
    return chunks


def _model(hf: dict[str, Any], family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """`calculate_per_token_loss`: see `learner.py`."""
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": num_kv_heads(hf),
        "kv_channels": head_size(hf),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm != "none",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Megatron marks a parameter as sharded where it initializes it; an unmarked one would count
        # once in the gradient norm. The weights themselves are the folder's.
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "use_cpu_initialization": torch.get_default_device().type == "meta"
        or not torch.cuda.is_available(),
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "calculate_per_token_loss": True,
    }


def _fused(backend: Backend) -> dict[str, Any]:
    """What is one kernel each. Megatron's own gradients want Apex' for it, and its layers are in
    every model: the embedding, the head."""
    return {
        "apply_rope_fusion": backend.is_engine,
        "bias_activation_fusion": backend.is_engine,
        "moe_grouped_gemm": backend.is_engine,
        "gradient_accumulation_fusion": backend.fuses_gradients,
    }


def _window(positions: list[Positions]) -> dict[str, Any]:
    """Hugging Face counts a token itself as one of its window, Megatron does not."""
    windows = {each.window for each in positions if each.window is not None}
    if not windows:
        return {}
    (window,) = windows
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(each.window is not None) for each in positions],
    }


def _experts(hf: dict[str, Any]) -> dict[str, Any]:
    if "num_experts" not in hf:
        return {}
    dense, every = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    return {
        "num_moe_experts": hf["num_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        # The softmax of the chosen logits is the chosen part of the softmax, normalized.
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_load_balancing_type": "none",
        "moe_layer_freq": [
            int(layer not in dense and (layer + 1) % every == 0)
            for layer in range(hf["num_hidden_layers"])
        ],
    }


def _layout(mesh: Mesh, dtype: torch.dtype) -> dict[str, Any]:
    parallel = mesh.parallel
    interleaved = {
        "virtual_pipeline_model_parallel_size": parallel.vpp,
        # Megatron's default sends both directions between two stages in one batch, which mixes
        # them up where the stages are only two (gradients off by their own size, no error).
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }
    recompute = {
        "none": {},
        "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }[parallel.recompute]
    return {
        "tensor_model_parallel_size": mesh.tp_size,
        "sequence_parallel": mesh.tp_size > 1,
        "pipeline_model_parallel_size": mesh.pp_size,
        "context_parallel_size": mesh.cp_size,
        "expert_model_parallel_size": mesh.ep_size,
        "pipeline_dtype": dtype,
        # Stages tell each other the length of each packed micro-batch.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # which the line above demands, experts or not
        **(interleaved if parallel.vpp > 1 else {}),
        **recompute,
    }


def _leave(weight: Tensor) -> Tensor:
    return weight

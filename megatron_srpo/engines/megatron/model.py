"""A Hugging Face folder -> Megatron's GPTModel with its weights, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_srpo.engines.megatron.attention import PackedCausalAttention
from megatron_srpo.engines.megatron.families.qwen2 import QWEN2
from megatron_srpo.engines.megatron.names import Family, join, split
from megatron_srpo.hf_folder import head_size, num_kv_heads, read_config, read_tensors
from megatron_srpo.types import InputError

FAMILIES = (QWEN2,)


def family_of(folder: Path) -> Family:
    """Raises `InputError` for a model that is not supported."""
    model_type = read_config(folder).get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise InputError(f"{folder}: model_type {model_type!r} is not supported (supported: {known})")


def is_tied(folder: Path) -> bool:
    """Input embedding and output head are one tensor."""
    return bool(read_config(folder).get("tie_word_embeddings", False))


def build_model(folder: Path, dtype: torch.dtype) -> GPTModel:
    """With the folder's weights. Raises `InputError` if they do not fit its config."""
    hf, family = read_config(folder), family_of(folder)
    if hf.get("use_sliding_window") or hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"{folder}: sliding windows and activations but silu are not supported")
    config = transformer_config(hf, family, dtype)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.self_attention.submodules.core_attention = PackedCausalAttention
    model = GPTModel(
        config,
        spec,
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=int(_rope_theta(hf)),
        share_embeddings_and_output_weights=is_tied(folder),
    )
    load_hf(model, folder, family)
    return model


def transformer_config(hf: dict[str, Any], family: Family, dtype: torch.dtype) -> TransformerConfig:
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
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        calculate_per_token_loss=True,
    )


def _rope_theta(hf: dict[str, Any]) -> float:
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise InputError(f"rotary scaling {kind!r} is not supported")
    return scaling.get("rope_theta") or hf.get("rope_theta", 10000.0)


def load_hf(model: GPTModel, folder: Path, family: Family) -> None:
    """Copy the folder's weights into the model."""
    tensors = dict(read_tensors(folder))
    num_groups, _ = head_groups(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layout, hf_names = family.rule(name)
            missing = [hf_name for hf_name in hf_names if hf_name not in tensors]
            if missing:
                raise InputError(f"{folder}: the weights lack {missing[0]}")
            joined = join(layout, [tensors.pop(hf_name) for hf_name in hf_names], num_groups)
            if joined.shape != parameter.shape:
                raise InputError(
                    f"{folder}: {hf_names[0]} has a shape that does not fit config.json "
                    f"({tuple(joined.shape)} instead of {tuple(parameter.shape)})"
                )
            parameter.copy_(joined)
    tensors.pop("lm_head.weight", None)  # a tied head that was stored all the same
    if tensors:
        raise InputError(f"{folder}: weights that the model has no place for: {min(tensors)}")


def head_groups(model: GPTModel) -> tuple[int, int]:
    """(key-value groups, query heads in each)"""
    num_groups = model.config.num_query_groups
    assert num_groups is not None
    return num_groups, model.config.num_attention_heads // num_groups


def export_hf(model: GPTModel, family: Family) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor), one Megatron parameter at a time.

    Always ends with `lm_head.weight`: an engine that packs its head cannot follow a tie.
    """
    num_groups, heads_per_group = head_groups(model)
    tied = model.share_embeddings_and_output_weights
    head = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
    assert head is not None, "the head lies on another pipeline stage"
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight":
            continue
        layout, hf_names = family.rule(name)
        parts = split(layout, parameter.detach(), num_groups, heads_per_group)
        yield from zip(hf_names, parts, strict=True)
    yield "lm_head.weight", head.detach()

"""Which family is a Hugging Face model of, and is it supported?   Imports nothing of Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_srpo.engines.megatron.families.qwen2 import QWEN2
from megatron_srpo.engines.megatron.names import Family
from megatron_srpo.hf_folder import read_config
from megatron_srpo.types import InputError

FAMILIES = (QWEN2,)


def family_of(folder: Path) -> Family:
    """Raises `InputError` for a model that is not supported."""
    config = read_config(folder)
    model_type = config.get("model_type")
    known = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in known:
        raise InputError(
            f"{folder}: model_type {model_type!r} is not supported (supported: {', '.join(known)})"
        )
    if config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{folder}: sliding windows and activations but silu are not supported")
    if (scaling := _rope(config)) != "default":
        raise InputError(f"{folder}: rotary scaling {scaling!r} is not supported")
    return known[model_type]


def rope_theta(config: dict[str, Any]) -> float:
    """Base of the rotary frequencies, wherever this version of config.json has it."""
    parameters = config.get("rope_parameters") or {}
    return parameters.get("rope_theta") or config.get("rope_theta", 10000.0)


def _rope(config: dict[str, Any]) -> str:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default"))

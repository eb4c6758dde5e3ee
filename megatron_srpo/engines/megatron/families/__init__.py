"""Which family is a Hugging Face model of, and is it supported?   Imports nothing of Megatron.

Every file of this folder is a family and says so in `FAMILY`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from megatron_srpo.engines.megatron.names import Family
from megatron_srpo.engines.megatron.positions import check_rope
from megatron_srpo.hf_config import completed_config, num_experts
from megatron_srpo.hf_folder import stated_config
from megatron_srpo.types import InputError

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for module in pkgutil.iter_modules(__path__)
    for family in [importlib.import_module(f"{__name__}.{module.name}").FAMILY]
}


def family_of(folder: Path) -> Family:
    """Raises `InputError` for a model that is not supported, or that transformers would refuse."""
    stated = stated_config(folder)
    model_type = stated.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{folder}: model_type {model_type!r} is not supported "
            f"(supported: {', '.join(sorted(FAMILIES))})"
        )
    family = FAMILIES[model_type]
    if stated.get("architectures") not in (None, [family.architecture]):
        raise InputError(
            f"{folder}: the architecture {stated['architectures']} is not supported "
            f"(of {model_type} models only {family.architecture})"
        )
    for key, only in ONLY.items():
        if stated.get(key, only) not in (only, None):
            raise InputError(
                f"{folder}: {key}={stated[key]!r} is not supported in {model_type} models"
            )
    check_rope(folder, stated)
    _check_sizes(folder, completed_config(folder), family)
    return family


def _check_sizes(folder: Path, config: dict[str, Any], family: Family) -> None:
    """What transformers lets pass and Megatron, or transformers itself, would stumble over."""
    path = folder / "config.json"
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise InputError(f"{path}: {heads} heads do not divide by num_key_value_heads={groups}")
    types = config.get("layer_types") or ()
    if unknown := {*types} - {"full_attention", "sliding_attention"}:
        raise InputError(f"{path}: layer_types has {min(unknown)!r}, which is not supported")
    if "sliding_attention" in types and not family.has_windows:
        raise InputError(f"{path}: {family.model_type} models with sliding windows are unsupported")
    if "sliding_attention" in types and not config["sliding_window"]:
        raise InputError(f"{path}: layer_types has sliding windows, but sliding_window is not set")
    if num_experts(config):
        chosen, is_normed = config["num_experts_per_tok"], config["norm_topk_prob"]
        if not 1 <= chosen <= num_experts(config):
            raise InputError(f"{path}: num_experts_per_tok={chosen} of {num_experts(config)}")
        if chosen == 1 and is_normed:
            raise InputError(f"{path}: norm_topk_prob with num_experts_per_tok=1 is not supported")


ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "is_causal": True,
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}
"""What config.json may say, where it says it: Megatron computes nothing else here."""

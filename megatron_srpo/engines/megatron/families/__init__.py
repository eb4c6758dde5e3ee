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
from megatron_srpo.hf_folder import read_config
from megatron_srpo.types import InputError

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for module in pkgutil.iter_modules(__path__)
    for family in [importlib.import_module(f"{__name__}.{module.name}").FAMILY]
}


def family_of(folder: Path) -> Family:
    """Raises `InputError` for a model that is not supported."""
    config = read_config(folder)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{folder}: model_type {model_type!r} is not supported "
            f"(supported: {', '.join(sorted(FAMILIES))})"
        )
    family = FAMILIES[model_type]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise InputError(
            f"{folder}: the architecture {architectures[0]!r} is not supported "
            f"(of {model_type} models only {family.architecture})"
        )
    for key, only in ONLY.items():
        if config.get(key, only) not in (only, None):
            raise InputError(
                f"{folder}: {key}={config[key]!r} is not supported in {model_type} models"
            )
    check_rope(folder, config)
    return family


ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}
"""What config.json may say, where it says it: Megatron computes nothing else here."""

"""What does config.json mean?   as transformers completes it: defaults, old names made new

A key that config.json leaves out has the default of its family, which is not the same in all: every
size that a model is built from is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_srpo.hf_folder import read_config
from megatron_srpo.types import InputError


def transformers_config(folder: Path) -> Any:
    """Raises `InputError` for what transformers itself refuses, or stumbles over."""
    read_config(folder)
    # Imported here: a second, for which a mere mistake in a file need not wait.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{folder / 'config.json'}: transformers refuses it: {reason}") from error


def completed_config(folder: Path) -> dict[str, Any]:
    """Every key, under its new name and under the one that the family has for it."""
    config = transformers_config(folder)
    return {key: getattr(config, key) for key in {*config.to_dict(), *config.attribute_map}}


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """Of a completed config; as many as query heads in families that know no other."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def head_size(config: Mapping[str, Any]) -> int:
    """Of a completed config; the hidden size's share in families that know no other."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def num_experts(config: Mapping[str, Any]) -> int:
    """Of a completed config; 0 in a model without experts."""
    return config.get("num_experts") or 0

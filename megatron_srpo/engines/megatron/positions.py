"""What does a token know of where others stand?   a folder's config.json -> `Positions` per layer

The scaling rules are transformers' own (modeling_rope_utils.py), so that what was trained there
turns by the same angles here. Imports nothing of Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.hf_config import head_size, transformers_config
from megatron_srpo.types import InputError

NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Supported rope types, and what config.json must say for each. Others (dynamic, longrope) turn by
angles that depend on how long the sequence is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """Of one layer."""

    inverse_frequency: Tensor
    """[head size / 2] float32, radians per position."""
    attention_factor: float
    """Cosines and sines are multiplied by it, so that scores are by its square (YaRN)."""
    window: int | None
    """A token sees so many, itself included; None: all before it."""


def check_rope(folder: Path, config: dict[str, Any]) -> None:
    """Raises `InputError` for a scaling that is not supported, or half of one; `config` is
    config.json as it stands."""
    path = folder / "config.json"
    for rope in _stated(path, config):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in NEEDS:
            raise InputError(
                f"{path}: rope type {rope_type!r} is not supported (supported: {', '.join(NEEDS)})"
            )
        for key in NEEDS[rope_type]:
            if key not in rope:
                raise InputError(f"{path}: rope type {rope_type!r} needs {key!r}")
        for key in ("rope_theta", *NEEDS[rope_type]):
            if not isinstance(rope.get(key, 1), int | float):
                raise InputError(f"{path}: {key} must be a number, not {rope[key]!r}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(f"{path}: a partial_rotary_factor is not supported")


def _stated(path: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Rope parameters, of each type of layers if they differ, under either name that transformers
    has had for them."""
    found: list[dict[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        parameters = config.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise InputError(f"{path}: {key} must be a mapping of keys to values")
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        if nested and len(nested) < len(parameters):
            raise InputError(f"{path}: {key} mixes those of all layers and of types of layers")
        found += nested or [parameters]
    return found


def positions_of(folder: Path) -> list[Positions]:
    """One per layer."""
    config = transformers_config(folder)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    known = {layer_type: _positions(config, layer_type) for layer_type in dict.fromkeys(types)}
    return [known[layer_type] for layer_type in types]


def _positions(config: Any, layer_type: str) -> Positions:
    parameters, of_type = config.rope_parameters, None
    if layer_type in parameters:
        parameters, of_type = parameters[layer_type], layer_type
    frequency, factor = _rope(config, parameters, of_type)
    return Positions(
        inverse_frequency=frequency,
        attention_factor=factor,
        window=config.sliding_window if layer_type == "sliding_attention" else None,
    )


def _rope(config: Any, parameters: dict[str, Any], layer_type: str | None) -> tuple[Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, layer_type=layer_type)
    size = head_size(config.to_dict())
    return parameters["rope_theta"] ** -(torch.arange(0, size, 2).float() / size), 1.0

"""Which Hugging Face tensors make one Megatron parameter, and back: one table, both directions.

The same table carries weights in, weights out, and gradients in tests. Megatron's joint qkv holds,
for each key-value group, the group's query heads, then its key head, then its value head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["copy", "concat", "qkv"]
Rule = tuple[Layout, tuple[str, ...]]

TOP: dict[str, Rule] = {
    "embedding.word_embeddings.weight": ("copy", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": ("copy", ("model.norm.weight",)),
    "output_layer.weight": ("copy", ("lm_head.weight",)),
}
LAYER_PREFIX = "decoder.layers."


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What distinguishes a family of models; one file in `families/` each."""

    model_types: tuple[str, ...]
    """`model_type` in config.json"""
    qkv_bias: bool
    layer: Mapping[str, Rule]
    """Megatron name within a layer -> layout and Hugging Face names within a layer"""

    def rule(self, name: str) -> Rule:
        """The rule for a Megatron parameter, with full Hugging Face names."""
        if name in TOP:
            return TOP[name]
        index, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
        layout, hf_names = self.layer[rest]
        return layout, tuple(f"model.layers.{index}.{hf_name}" for hf_name in hf_names)


def join(layout: Layout, tensors: Sequence[Tensor], num_groups: int) -> Tensor:
    """Hugging Face tensors -> the Megatron one."""
    if layout == "qkv":
        per_group = [t.reshape(num_groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(per_group, dim=1).flatten(0, 1)
    return torch.cat(list(tensors)) if layout == "concat" else tensors[0]


def split(layout: Layout, tensor: Tensor, num_groups: int, heads_per_group: int) -> list[Tensor]:
    """The Megatron tensor -> Hugging Face ones: the inverse of `join`."""
    if layout == "qkv":
        per_group = tensor.reshape(num_groups, heads_per_group + 2, -1, *tensor.shape[1:])
        parts = per_group.split([heads_per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]
    return list(tensor.chunk(2)) if layout == "concat" else [tensor]

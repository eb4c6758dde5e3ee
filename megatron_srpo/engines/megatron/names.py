"""Which Hugging Face tensors make one Megatron parameter, and back: one table, both directions.

    Hugging Face tensors  <--join, split-->  Megatron's tensor  <--part, whole-->  its shards

The same table carries weights in, weights out, checkpoints, and gradients in tests. Megatron's
joint qkv holds, for each key-value group, the group's query heads, then its key head, then its
value head; its fc1 holds gate, then up, and so does every shard of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_srpo.hf_config import completed_config, num_kv_heads
from megatron_srpo.hf_folder import EMBEDDING, HEAD

Layout = Literal["copy", "gate_up", "qkv", "vocabulary"]
Rule = tuple[Layout, tuple[str, ...]]

TOP: dict[str, Rule] = {
    "embedding.word_embeddings.weight": ("vocabulary", (EMBEDDING,)),
    "decoder.final_layernorm.weight": ("copy", ("model.norm.weight",)),
    "output_layer.weight": ("vocabulary", (HEAD,)),
}
LAYER_PREFIX = "decoder.layers."
IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
IN_EXPERT = re.compile(r"(.+\.local_experts\.)(\d+)(\..+)")
ENGINE_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight"), "pre_mlp_layernorm.weight"),
    (
        re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)"),
        r"mlp.experts.local_experts.\2.\1.weight",
    ),
)
"""Transformer Engine's, within a layer, and what they are here: a norm is part of the linear behind
it, and all experts of a process are one module."""
VOCABULARY_MULTIPLE = 128
"""Megatron's vocabulary is padded to a multiple of this with rows of zeros: it divides by every
power of two up to this, and checkpoints have one shape on all layouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What distinguishes a family of models; one file in `families/` each."""

    model_type: str
    """In config.json; the class there must be that of the language model alone."""
    architecture: str
    layer: Mapping[str, Rule]
    """Megatron name within a layer -> layout and Hugging Face names within a layer. `{}` is the
    index of an expert."""
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: of each head by itself, or of all heads together."""
    norms: Literal["pre", "post"] = "pre"
    """Where a layer normalizes: what enters attention and MLP, or what leaves them."""
    has_windows: bool = False
    """Whether some layers may have a sliding window."""

    def rule(self, name: str) -> Rule:
        """The rule for a Megatron parameter, with full Hugging Face names."""
        if name in TOP:
            return TOP[name]
        layer, rest = _matched(IN_LAYER, name).groups()
        expert = ""
        if in_expert := IN_EXPERT.fullmatch(rest):
            before, expert, behind = in_expert.groups()
            rest = f"{before}{{}}{behind}"
        layout, hf_names = self.layer[rest]
        return layout, tuple(f"model.layers.{layer}.{n.format(expert)}" for n in hf_names)


def name_of(name: str) -> str:
    """A parameter's name in the tables, whichever backend's it is.

    >>> name_of("decoder.layers.3.mlp.experts.linear_fc2.weight7")
    'decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight'
    """
    for pattern, ours in ENGINE_NAMES:
        name = pattern.sub(ours, name)
    return name


def _matched(pattern: re.Pattern[str], name: str) -> re.Match[str]:
    match = pattern.fullmatch(name)
    assert match is not None, f"{name} is no parameter of a GPTModel"
    return match


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How a model's attention is cut into heads, and how many tokens it knows."""

    num_groups: int
    """Key-value heads."""
    per_group: int
    """Query heads of each."""
    vocab_size: int

    @property
    def padded_vocab_size(self) -> int:
        return padded_size(self.vocab_size)


def padded_size(vocab_size: int) -> int:
    """Rows of Megatron's embedding."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def heads_of(folder: Path) -> Heads:
    """Of the model in a Hugging Face folder."""
    hf = completed_config(folder)
    num_groups = num_kv_heads(hf)
    return Heads(
        num_groups=num_groups,
        per_group=hf["num_attention_heads"] // num_groups,
        vocab_size=hf["vocab_size"],
    )


def join(layout: Layout, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
    """Hugging Face tensors -> the Megatron one."""
    if layout == "qkv":
        per_group = [t.reshape(heads.num_groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(per_group, dim=1).flatten(0, 1)
    if layout == "gate_up":
        return torch.cat(list(tensors))
    (tensor,) = tensors
    if layout == "vocabulary":
        padding = heads.padded_vocab_size - len(tensor)
        return torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
    return tensor


def split(layout: Layout, tensor: Tensor, heads: Heads) -> list[Tensor]:
    """The Megatron tensor -> Hugging Face ones: the inverse of `join`."""
    if layout == "qkv":
        per_group = tensor.reshape(heads.num_groups, heads.per_group + 2, -1, *tensor.shape[1:])
        parts = per_group.split([heads.per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]
    if layout == "gate_up":
        return list(tensor.chunk(2))
    return [tensor[: heads.vocab_size]] if layout == "vocabulary" else [tensor]


def part(layout: Layout, tensor: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """One rank's shard of the Megatron tensor; `dim` is sharded, None: all ranks hold all."""
    if dim is None:
        return tensor
    if layout == "gate_up" and dim == 0:
        return torch.cat([half.tensor_split(size)[rank] for half in tensor.chunk(2)])
    return tensor.tensor_split(size, dim=dim)[rank]


def whole(layout: Layout, shards: Sequence[Tensor], dim: int | None) -> Tensor:
    """All ranks' shards -> the Megatron tensor: the inverse of `part`."""
    if dim is None or len(shards) == 1:
        return shards[0]
    if layout == "gate_up" and dim == 0:
        halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([torch.cat(half) for half in halves])
    return torch.cat(list(shards), dim=dim)

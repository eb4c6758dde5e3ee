"""A whole model without its numbers: what it is made of, in Hugging Face's names and in Megatron's.

hf_shapes:  what a folder must hold for it
join:       Hugging Face tensors -> a Megatron parameter, unsharded
split:      and back
state:      where each parameter goes in a distributed checkpoint, as Megatron itself says
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.names import Family, Heads, heads_of, join, split
from megatron_srpo.engines.megatron.weights import local_parameters, sharded_dim

NUMBERED = {"non_homogeneous_layers": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One of the model's."""

    shape: tuple[int, ...]
    """Unsharded."""
    dim: int | None
    """Along which tensor parallel ranks would divide it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """In the order in which the model computes."""

    family: Family
    heads: Heads
    parameters: Mapping[str, Parameter]
    """Megatron name -> parameter."""
    state: Mapping[str, Any]
    """Megatron name -> ShardedTensor or its factory, without memory; and Megatron's `_extra_state`
    objects, which are empty and without which it refuses to load."""

    def hf_names(self, name: str) -> tuple[str, ...]:
        """Hugging Face tensors of a parameter."""
        return self.family.rule(name)[1]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of a folder; a tied head is none."""
        return {
            hf_name: tuple(part.shape)
            for name, parameter in self.parameters.items()
            for hf_name, part in self.split(name, torch.empty(parameter.shape, device="meta"))
        }

    def join(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """In the order of `hf_names(name)`."""
        return join(self.family.rule(name)[0], tensors, self.heads)

    def split(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """(Hugging Face name, tensor), views where that is possible."""
        layout, hf_names = self.family.rule(name)
        parts = split(layout, tensor, self.heads)
        return list(zip(hf_names, parts, strict=True))


def outline(folder: Path, mesh: Mesh, *, numbered: bool = False) -> Outline:
    """Of the model that config.json describes; the folder's weights are not looked at.

    A checkpoint holds the tensors of all layers as one, or of each under its number. Megatron does
    the former where all layers are alike, if it is not asked for the latter (`numbered`)."""
    assert mesh.world_size == 1, "on several processes a model has only a part of its parameters"
    with torch.device("meta"):
        (model,) = build_chunks(folder, mesh, torch.float32)
    return Outline(
        family=family_of(folder),
        heads=heads_of(folder),
        parameters={
            name: Parameter(shape=tuple(p.shape), dim=sharded_dim(name, p))
            for name, p in local_parameters([model], mesh).items()
        },
        state=model.sharded_state_dict(metadata=NUMBERED if numbered else None),
    )

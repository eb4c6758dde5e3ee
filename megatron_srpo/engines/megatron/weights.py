"""Hugging Face tensors <-> Megatron's shards, over tensor, pipeline and expert parallel ranks.

    load_hf:       full tensors of a folder -> this rank's shards
    full_tensors:  every rank's shards -> full tensors, one at a time, the same on every rank

A parameter is named as in a model of one stage that holds all experts: layers are counted over the
whole pipeline, experts over all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.fp8 import plain, write
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.names import (
    IN_EXPERT,
    IN_LAYER,
    Family,
    Heads,
    heads_of,
    join,
    name_of,
    part,
    split,
    whole,
)
from megatron_srpo.hf_folder import EMBEDDING, HEAD, check_finite, read_tensors
from megatron_srpo.types import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What a rank must know of a parameter that another stage or expert rank may hold."""

    name: str
    stage: int
    expert_rank: int | None
    """Which expert parallel rank holds it; None: all of them do."""
    shape: tuple[int, ...]
    """On each tensor parallel rank."""
    dim: int | None
    """Along which it is sharded; None: every tensor parallel rank holds all of it."""


def local_parameters(chunks: Sequence[GPTModel], mesh: Mesh) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters, by their names in a model of one stage."""
    return {
        _global_name(chunk, name, mesh): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def _global_name(chunk: GPTModel, name: str, mesh: Mesh) -> str:
    def layer(match: re.Match[str]) -> str:
        here: Any = chunk.decoder.layers[int(match[1])]
        return f"decoder.layers.{here.layer_number - 1}.{match[2]}"

    def expert(match: re.Match[str]) -> str:
        num_experts = chunk.config.num_moe_experts
        assert num_experts is not None
        first = mesh.ep_rank * num_experts // mesh.ep_size
        return f"{match[1]}{first + int(match[2])}{match[3]}"

    return IN_EXPERT.sub(expert, IN_LAYER.sub(layer, name_of(name)))


def sharded_dim(name: str, parameter: torch.nn.Parameter) -> int | None:
    """Both backends mark the parameters that they shard. Transformer Engine's experts, which are
    told nothing of tensor parallelism, say 0 of every dimension."""
    marked: Any = parameter
    if not getattr(marked, "tensor_model_parallel", False):
        return None
    return 1 if name.endswith(".linear_fc2.weight") else marked.partition_dim


def all_shards(chunks: Sequence[GPTModel], mesh: Mesh) -> list[Shard]:
    """Collective: the parameters of all stages and experts, in the same order on all ranks."""
    mine = [
        Shard(
            name=name,
            stage=mesh.pp_rank,
            expert_rank=mesh.ep_rank if IN_EXPERT.fullmatch(name) else None,
            shape=tuple(p.shape),
            # Several expert parallel ranks hold whole experts, each its own.
            dim=None if IN_EXPERT.fullmatch(name) and mesh.ep_size > 1 else sharded_dim(name, p),
        )
        for name, p in local_parameters(chunks, mesh).items()
    ]
    return list(dict.fromkeys(shard for shards in mesh.gather(mine) for shard in shards))


def load_hf(chunks: Sequence[GPTModel], folder: Path, mesh: Mesh) -> None:
    """Copy the folder's weights into the model. Raises `InputError` if they do not fit it."""
    tied = chunks[0].share_embeddings_and_output_weights
    family, heads = family_of(folder), heads_of(folder)
    tensors = dict(read_tensors(folder))
    if tied and EMBEDDING in tensors:  # the last stage holds a copy of it as its head
        tensors[HEAD] = tensors[EMBEDDING]
    known: set[str] = {HEAD} if tied else set()
    parameters = local_parameters(chunks, mesh)
    for shard in all_shards(chunks, mesh):
        layout, hf_names = family.rule(shard.name)
        known.update(hf_names)
        missing = [hf_name for hf_name in hf_names if hf_name not in tensors]
        if missing:
            raise InputError(f"{folder}: the weights lack {missing[0]}")
        if shard.name not in parameters:
            continue
        given = [tensors[hf_name] for hf_name in hf_names]
        for hf_name, tensor in zip(hf_names, given, strict=True):
            check_finite(hf_name, tensor, folder)
        if layout == "vocabulary" and len(given[0]) != heads.vocab_size:
            raise InputError(
                f"{folder}: {hf_names[0]} has {len(given[0])} rows, but config.json says "
                f"vocab_size={heads.vocab_size}"
            )
        full = join(layout, given, heads)
        own = part(layout, full, shard.dim, mesh.tp_rank, mesh.tp_size)
        if own.shape != shard.shape:
            raise InputError(
                f"{folder}: {hf_names[0]} has a shape that does not fit config.json "
                f"({tuple(own.shape)} instead of {shard.shape})"
            )
        write(parameters[shard.name], own)
    if unknown := tensors.keys() - known:
        raise InputError(f"{folder}: weights that the model has no place for: {min(unknown)}")


def full_tensors(
    family: Family,
    heads: Heads,
    mesh: Mesh,
    shards: Sequence[Shard],
    local: Mapping[str, Tensor],
    *,
    tied: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Collective: (Hugging Face name, full tensor), weights or whatever has their shapes.

    `shards` are the model's (`all_shards`; they never change), `local` holds this rank's tensors by
    parameter name, all of one dtype. `lm_head.weight` always comes, after the embedding if it is
    tied to it: an engine that packs its head cannot follow a tie. A last stage's own copy of a tied
    head is not sent: the probe after a weight sync, which computes with it, shows whether it is the
    embedding still.
    """
    some = next(iter(local.values()))
    for shard in shards:
        layout, hf_names = family.rule(shard.name)
        if tied and hf_names == (HEAD,):
            continue
        here = _from_holder(shard, local, mesh, some)
        full = whole(layout, _over_tp(shard, here, mesh), shard.dim)
        for hf_name, tensor in zip(hf_names, split(layout, full, heads), strict=True):
            yield hf_name, tensor
            if tied and hf_name == EMBEDDING:
                yield HEAD, tensor


def _from_holder(shard: Shard, local: Mapping[str, Tensor], mesh: Mesh, like: Tensor) -> Tensor:
    """The shard of this tensor parallel rank, from the stage and the expert rank that hold it."""
    is_mine = shard.name in local
    tensor = (
        plain(local[shard.name])
        if is_mine
        else torch.empty(shard.shape, dtype=like.dtype, device=like.device)
    )
    if shard.expert_rank is not None and mesh.ep_size > 1 and shard.stage == mesh.pp_rank:
        dist.broadcast(tensor, group=mesh.ep_group, group_src=shard.expert_rank)
    if mesh.pp_size > 1:
        dist.broadcast(tensor, group=mesh.pp_group, group_src=shard.stage)
    return tensor


def _over_tp(shard: Shard, tensor: Tensor, mesh: Mesh) -> list[Tensor]:
    """All shards of a parameter, in the order of ranks."""
    if shard.dim is None or mesh.tp_size == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(mesh.tp_size)]
    dist.all_gather(shards, tensor.contiguous(), group=mesh.tp_group)
    return shards

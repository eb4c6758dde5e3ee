"""Hugging Face tensors <-> Megatron's shards, over tensor and pipeline parallel ranks.

    load_hf:       full tensors of a folder -> this rank's shards
    full_tensors:  every rank's shards -> full tensors, one at a time, the same on every rank

A parameter is named as in a model of one stage: layers are counted over the whole pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.names import LAYER_PREFIX, Family, join, split
from megatron_srpo.hf_folder import EMBEDDING, HEAD, read_tensors
from megatron_srpo.types import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What a rank must know of a parameter that another stage may hold."""

    name: str
    stage: int
    shape: tuple[int, ...]
    """On each tensor parallel rank."""
    dim: int | None
    """Along which it is sharded; None: every tensor parallel rank holds all of it."""


def local_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """This stage's parameters, by their names in a model of one stage."""
    return {_global_name(model, name): p for name, p in model.named_parameters()}


def _global_name(model: GPTModel, name: str) -> str:
    if not name.startswith(LAYER_PREFIX):
        return name
    index, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    layer: Any = model.decoder.layers[int(index)]
    return f"{LAYER_PREFIX}{layer.layer_number - 1}.{rest}"


def sharded_dim(parameter: torch.nn.Parameter) -> int | None:
    """Megatron marks the parameters that it shards."""
    marked: Any = parameter
    return marked.partition_dim if getattr(marked, "tensor_model_parallel", False) else None


def all_shards(model: GPTModel, mesh: Mesh) -> list[Shard]:
    """Collective: the parameters of all stages, first to last."""
    mine = [
        Shard(name=name, stage=mesh.pp_rank, shape=tuple(p.shape), dim=sharded_dim(p))
        for name, p in local_parameters(model).items()
    ]
    of_stage = {shards[0].stage: shards for shards in mesh.gather(mine)}
    return [shard for stage in sorted(of_stage) for shard in of_stage[stage]]


def head_groups(model: GPTModel, mesh: Mesh) -> tuple[int, int]:
    """(key-value groups of one tensor parallel rank, query heads in each)"""
    num_groups = model.config.num_query_groups
    assert num_groups is not None
    return num_groups // mesh.tp_size, model.config.num_attention_heads // num_groups


def load_hf(model: GPTModel, folder: Path, family: Family, mesh: Mesh) -> None:
    """Copy the folder's weights into the model. Raises `InputError` if they do not fit it."""
    tied = model.share_embeddings_and_output_weights
    tensors = dict(read_tensors(folder))
    if tied and EMBEDDING in tensors:  # the last stage holds a copy of it as its head
        tensors[HEAD] = tensors[EMBEDDING]
    num_groups, _ = head_groups(model, mesh)
    known: set[str] = {HEAD} if tied else set()
    parameters = local_parameters(model)
    for shard in all_shards(model, mesh):
        layout, hf_names = family.rule(shard.name)
        known.update(hf_names)
        missing = [hf_name for hf_name in hf_names if hf_name not in tensors]
        if missing:
            raise InputError(f"{folder}: the weights lack {missing[0]}")
        if shard.stage != mesh.pp_rank:
            continue
        parts = [_part(tensors[hf_name], shard, mesh) for hf_name in hf_names]
        joined = join(layout, parts, num_groups)
        if joined.shape != shard.shape:
            raise InputError(
                f"{folder}: {hf_names[0]} has a shape that does not fit config.json "
                f"({tuple(joined.shape)} instead of {shard.shape})"
            )
        with torch.no_grad():
            parameters[shard.name].copy_(joined)
    if unknown := tensors.keys() - known:
        raise InputError(f"{folder}: weights that the model has no place for: {min(unknown)}")


def _part(tensor: Tensor, shard: Shard, mesh: Mesh) -> Tensor:
    """This tensor parallel rank's part of a full tensor."""
    if shard.dim is None:
        return tensor
    return tensor.tensor_split(mesh.tp_size, dim=shard.dim)[mesh.tp_rank]


def full_tensors(
    model: GPTModel,
    family: Family,
    mesh: Mesh,
    shards: Sequence[Shard],
    local: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Collective: (Hugging Face name, full tensor), weights or whatever has their shapes.

    `shards` are the model's (`all_shards`; they never change), `local` holds this rank's tensors by
    parameter name, all of one dtype. `lm_head.weight` always comes, after the embedding if it is
    tied to it: an engine that packs its head cannot follow a tie. A last stage's own copy of a tied
    head is not sent: the probe after a weight sync, which computes with it, shows whether it is the
    embedding still.
    """
    tied = model.share_embeddings_and_output_weights
    num_groups, heads_per_group = head_groups(model, mesh)
    some = next(iter(local.values()))
    for shard in shards:
        layout, hf_names = family.rule(shard.name)
        if tied and hf_names == (HEAD,):
            continue
        here = _from_stage(shard, local, mesh, some)
        of_ranks = [
            split(layout, s, num_groups, heads_per_group) for s in _over_tp(shard, here, mesh)
        ]
        for hf_name, parts in zip(hf_names, zip(*of_ranks, strict=True), strict=True):
            full = parts[0] if len(parts) == 1 else torch.cat(parts, dim=shard.dim or 0)
            yield hf_name, full
            if tied and hf_name == EMBEDDING:
                yield HEAD, full


def _from_stage(shard: Shard, local: Mapping[str, Tensor], mesh: Mesh, like: Tensor) -> Tensor:
    """The shard of this tensor parallel rank, from the stage that holds it."""
    is_mine = shard.stage == mesh.pp_rank
    tensor = local[shard.name].detach() if is_mine else like.new_empty(shard.shape)
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

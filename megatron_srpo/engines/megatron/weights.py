"""Hugging Face tensors <-> Megatron's shards, over tensor, pipeline and expert parallel ranks.

    load_hf:       full tensors of a folder -> this rank's shards
    full_tensors:  every rank's shards -> full tensors, one at a time, the same on every rank,
                   gathered in buckets

A parameter is named as in a model of one stage that holds all experts: layers are counted over the
whole pipeline, experts over all ranks.
"""

from __future__ import annotations

import math
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

BUCKET_BYTES = 2**29
"""Of full tensors that are gathered together: enough for the network to be busy, little beside
what a rollout engine needs for its work."""


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
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Collective: (Hugging Face name, full tensor), weights or whatever has their shapes.

    `shards` are the model's (`all_shards`; they never change), `local` holds this rank's tensors by
    parameter name, all of one dtype. `lm_head.weight` always comes, after the embedding if it is
    tied to it: an engine that packs its head cannot follow a tie. A last stage's own copy of a tied
    head is not sent: the probe after a weight sync, which computes with it, shows whether it is the
    embedding still.

    Tensors stay on their device and are gathered bucket by bucket: at any time there are this
    rank's part of a bucket, the parts of all tensor parallel ranks, and one parameter put together
    and taken apart. A parameter that is larger than a bucket is one of its own. Nothing is used
    twice, so that a tensor may be kept: vLLM keeps those of a layer until it has all.
    """
    some = next(iter(local.values()))
    wanted = [s for s in shards if not (tied and family.rule(s.name)[1] == (HEAD,))]
    sizes = {s.name: math.prod(s.shape) * some.element_size() for s in wanted}
    for bucket in buckets(wanted, sizes, bucket_bytes // mesh.tp_size):
        for shard, parts in _gathered(bucket, local, mesh, some):
            yield from _named(family, heads, shard, parts, tied=tied)
            del parts  # or the bucket would be there while the next one is gathered


def _named(
    family: Family, heads: Heads, shard: Shard, parts: Sequence[Tensor], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of a parameter of which all ranks' parts are here."""
    layout, hf_names = family.rule(shard.name)
    full = whole(layout, parts, shard.dim)
    for hf_name, tensor in zip(hf_names, split(layout, full, heads), strict=True):
        yield hf_name, tensor
        if tied and hf_name == EMBEDDING:
            yield HEAD, tensor


def buckets(
    shards: Sequence[Shard], sizes: Mapping[str, int], most_bytes: int
) -> Iterator[list[Shard]]:
    """What travels together: it comes from one holder, all sharded or all not, and experts of one
    layer only, or a layer would be in many buckets. `sizes` and `most_bytes` are one rank's."""
    filling: dict[tuple[Any, ...], list[Shard]] = {}
    for shard in shards:
        layer = IN_LAYER.fullmatch(shard.name) if shard.expert_rank is not None else None
        kind = (shard.stage, shard.expert_rank, layer and layer[1], shard.dim is None)
        bucket = filling.setdefault(kind, [])
        if bucket and sum(sizes[s.name] for s in bucket) + sizes[shard.name] > most_bytes:
            yield bucket
            filling[kind] = bucket = []
        bucket.append(shard)
    yield from filling.values()


def _gathered(
    bucket: Sequence[Shard], local: Mapping[str, Tensor], mesh: Mesh, like: Tensor
) -> Iterator[tuple[Shard, list[Tensor]]]:
    """Each with the parts of all tensor parallel ranks, in their order; of one that is not sharded,
    one. What is all here already is not copied."""
    one = bucket[0]
    comes_from_expert = one.expert_rank is not None and mesh.ep_size > 1
    is_sharded = one.dim is not None and mesh.tp_size > 1
    if not is_sharded and not comes_from_expert and mesh.pp_size == 1:
        yield from ((shard, [plain(local[shard.name])]) for shard in bucket)
        return
    counts = [math.prod(shard.shape) for shard in bucket]
    if one.name in local:
        flat = torch.cat([plain(local[shard.name]).flatten() for shard in bucket])
    else:
        flat = torch.empty(sum(counts), dtype=like.dtype, device=like.device)
    if comes_from_expert and one.stage == mesh.pp_rank:
        dist.broadcast(flat, group=mesh.ep_group, group_src=one.expert_rank)
    if mesh.pp_size > 1:
        dist.broadcast(flat, group=mesh.pp_group, group_src=one.stage)
    rows = flat[None]
    if is_sharded:
        everywhere = flat.new_empty(mesh.tp_size * len(flat))
        dist.all_gather_into_tensor(everywhere, flat, group=mesh.tp_group)
        rows = everywhere.view(mesh.tp_size, -1)
    for shard, columns in zip(bucket, rows.split(counts, dim=1), strict=True):
        yield shard, [part.view(shard.shape) for part in columns]

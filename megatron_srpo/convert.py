"""Hugging Face folder <-> Megatron checkpoint, a parameter or a layer at a time.

    hf_to_megatron:  folder -> checkpoint
    megatron_to_hf:  checkpoint, also one of a training run -> folder

What goes in is checked against config.json before anything is written; what comes out is whole or
absent. Peak memory: the largest layer (or tensor in none), one shard, and a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import nan
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_srpo.checkpoint_folder import (
    check_checksums,
    hf_part,
    megatron_part,
    read_manifest,
    write_manifest,
)
from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.engines.megatron import torch_dist
from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.mesh import Mesh, build_mesh, destroy_mesh
from megatron_srpo.engines.megatron.model import is_tied
from megatron_srpo.engines.megatron.names import LAYER_PREFIX
from megatron_srpo.engines.megatron.outline import Outline, outline
from megatron_srpo.hf_config import completed_config
from megatron_srpo.hf_folder import (
    EMBEDDING,
    HEAD,
    Stored,
    check_castable,
    check_finite,
    check_shapes,
    one_dtype,
    read_finite,
    stored_tensors,
)
from megatron_srpo.hf_writer import (
    MAX_SHARD_BYTES,
    copy_all_but_weights,
    state_dtype,
    write_folder,
)
from megatron_srpo.inputs import check_layout
from megatron_srpo.staging import check_free, staged_folder
from megatron_srpo.types import InputError

T = TypeVar("T")
EXPERT = ".local_experts."


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Processes whose files a checkpoint is divided into; it loads on any others too."""

    tp: int = 1
    pp: int = 1
    ep: int = 1


def convert(
    *,
    hf: Path | None,
    checkpoint: Path | None,
    out: Path,
    layout: Layout,
    dtype: str | None,
    is_verified: bool,
) -> None:
    """The command: from `hf` or from `checkpoint`, one of them, in this process alone."""
    as_dtype = None if dtype is None else getattr(torch, dtype)
    if checkpoint is not None and layout != Layout():
        raise InputError("--tp, --pp and --ep divide a checkpoint's files: --ckpt writes none")
    mesh = build_mesh()
    try:
        if mesh.world_size > 1:
            raise InputError("a conversion is the work of one process: start it without a launcher")
        if hf is not None:
            hf_to_megatron(hf, out, mesh, layout=layout, dtype=as_dtype)
            checkpoint, as_hf = out, hf
        else:
            assert checkpoint is not None
            megatron_to_hf(checkpoint, out, mesh, dtype=as_dtype)
            as_hf = out
        print(f"{out}: written", file=sys.stderr)
        if is_verified:
            from megatron_srpo.verify import verify  # brings transformers' memory with it

            print(verify(as_hf, checkpoint, mesh, dtype=as_dtype), file=sys.stderr)
    finally:
        destroy_mesh()


def hf_to_megatron(
    hf: Path, out: Path, mesh: Mesh, *, layout: Layout, dtype: torch.dtype | None = None
) -> None:
    """In the stored dtype, or cast to `dtype`. Raises `InputError` for a folder that is not what
    its config.json says, whose weights are not finite, or for an `out` that cannot be written."""
    check_free(out)
    family_of(hf)
    _check_layout(hf, layout)
    stored, model = stored_tensors(hf), outline(hf, mesh)
    _check_weights(hf, stored, model)
    if dtype is not None:
        check_castable(hf, stored)
    stored_dtype = dtype or one_dtype(hf, stored)
    ranks = _ranks(model, layout)
    with staged_folder(out) as partial:
        hf_part(partial).mkdir()
        copy_all_but_weights(hf, hf_part(partial))
        if dtype is not None:
            state_dtype(hf_part(partial) / "config.json", dtype)
        with torch_dist.Writer(megatron_part(partial)) as writer:
            for name in _shown(model.parameters, f"{hf} -> {out}"):
                parts = [read_finite(stored, n, stored_dtype) for n in model.hf_names(name)]
                full = model.join(name, parts)
                dim = model.parameters[name].dim
                writer.add(model.state[name], full, dim=dim, ranks=ranks[name])
            for entry in torch_dist.objects(model.state):
                writer.add_object(entry, rank=0)
        name = _name(stored_dtype)
        write_manifest(partial, dtype=name, contents=("model",), has_checksums=True)


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """In the checkpoint's dtype, or cast to `dtype`; only the model is read of what is in it.

    Raises `InputError` for a checkpoint that is not whole, or not as it was written, lacks a
    tensor, or holds one that is not finite."""
    check_free(out)
    manifest = read_manifest(checkpoint)
    check_checksums(checkpoint, manifest)
    hf, folder = hf_part(checkpoint), megatron_part(checkpoint)
    family_of(hf)  # only for what it refuses
    stored = torch_dist.stored_tensors(folder)
    model = outline(hf, mesh, numbered=torch_dist.has_numbered_layers(stored))
    shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
    torch_dist.check_stored(folder, stored, model.state, shapes)
    write_folder(
        out,
        _hf_tensors(model, folder, dtype or getattr(torch, manifest.dtype), title=f"{out}"),
        like=hf,
        tied=is_tied(hf),
        is_cast=dtype is not None,
        max_shard_bytes=max_shard_bytes,
    )


def _hf_tensors(
    model: Outline, folder: Path, dtype: torch.dtype, *, title: str
) -> Iterator[tuple[str, Tensor]]:
    layers = [list(names) for _, names in groupby(model.parameters, key=_layer)]
    for names in _shown(layers, title):
        # What the checkpoint has no number for stays NaN, and is found.
        layer = {n: torch.full(model.parameters[n].shape, nan, dtype=dtype) for n in names}
        torch_dist.read_into(layer, folder, model.state)
        for name in names:
            tensor = layer.pop(name)
            check_finite(name, tensor, folder)
            yield from model.split(name, tensor)


def _check_weights(folder: Path, stored: dict[str, Stored], model: Outline) -> None:
    """A stored head that config.json ties must be the embedding: it is not taken along."""
    expected = model.hf_shapes()
    has_copy = is_tied(folder) and HEAD in stored and EMBEDDING in stored
    if has_copy:
        expected[HEAD] = expected[EMBEDDING]
    check_shapes(folder, stored, expected)
    if has_copy and not torch.equal(read_finite(stored, HEAD), read_finite(stored, EMBEDDING)):
        raise InputError(
            f"{folder}: {HEAD} is not {EMBEDDING}, although config.json has tie_word_embeddings"
        )


def _check_layout(folder: Path, layout: Layout) -> None:
    num_processes = layout.tp * layout.pp * layout.ep
    parallel = ParallelConfig(tp=layout.tp, pp=layout.pp, ep=layout.ep)
    check_layout(parallel, completed_config(folder), num_processes=num_processes)


def _layer(name: str) -> str:
    """What is read at a time: a layer, or what is in none."""
    if not name.startswith(LAYER_PREFIX):
        return name
    return name.removeprefix(LAYER_PREFIX).partition(".")[0]


def _ranks(model: Outline, layout: Layout) -> dict[str, range]:
    """Parameter -> tensor parallel ranks, of the stage and of the experts' part that hold it."""
    num_layers = 1 + max(_index(name, LAYER_PREFIX) for name in model.parameters)
    num_experts = 1 + max(_index(name, EXPERT) for name in model.parameters)

    def ranks(name: str) -> range:
        if name.startswith(LAYER_PREFIX):
            stage = _index(name, LAYER_PREFIX) * layout.pp // num_layers
        else:
            stage = 0 if name.startswith("embedding") else layout.pp - 1
        part = _index(name, EXPERT) * layout.ep // num_experts
        first = layout.tp * (part + layout.ep * stage)
        return range(first, first + layout.tp)

    return {name: ranks(name) for name in model.parameters}


def _index(name: str, before: str) -> int:
    """The number behind `before` in a parameter's name; 0 where there is none."""
    return int(name.partition(before)[2].partition(".")[0] or 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(items: Iterable[T], title: str) -> Iterable[T]:
    """A progress bar, where somebody sits at a terminal."""
    console = Console(file=sys.stderr)
    listed = list(items)
    return track(listed, title, console=console, disable=not console.is_terminal)

"""A new Hugging Face folder: a stream of tensors in shards, everything else as in an old one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_srpo.hf_folder import HEAD, INDEX, SINGLE, read_json
from megatron_srpo.staging import staged_folder

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
"""Not copied into a new folder: they hold the old weights, or say where those are."""
TEMPLATES = "additional_chat_templates"
"""The one folder within a folder that a tokenizer has."""
MAX_SHARD_BYTES = 5 * 10**9
Tensors = dict[str, torch.Tensor]


def write_folder(
    out: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    like: Path,
    tied: bool,
    is_cast: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Weights from the stream; config, tokenizer and templates copied from the folder `like`.

    What the stream has given must stay as it is. A tied head is not stored twice: `lm_head.weight`
    is left out if `tied`. At most a shard of `max_shard_bytes` is held in memory, or the largest
    tensor. `is_cast`: the weights may have another dtype than `like`'s had, and config.json names
    it. The folder is whole or absent.
    """
    with staged_folder(out) as partial:
        copy_all_but_weights(like, partial)
        kept = ((n, t.detach()) for n, t in tensors if not (tied and n == HEAD))
        dtype = _write_shards(partial, _shards(kept, max_shard_bytes))
        if is_cast:
            state_dtype(partial / "config.json", dtype)


def copy_all_but_weights(folder: Path, out: Path) -> None:
    """Config, generation config, tokenizer, chat templates: byte by byte."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, out / path.name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, out / TEMPLATES)


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], most: int) -> Iterator[Tensors]:
    """As many tensors at a time as fit. A view is copied: a file stores the memory of a tensor."""
    shard: Tensors = {}
    for name, tensor in tensors:
        if shard and _num_bytes(shard) + tensor.nbytes > most:
            yield shard
            shard = {}
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous()
        shard[name] = tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor
    yield shard


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_shards(folder: Path, shards: Iterator[Tensors]) -> torch.dtype:
    """Their names hold their number, which only the end of the stream tells."""
    of_shards: list[list[str]] = []
    total = 0
    dtype = torch.float32
    for shard in shards:
        save_file(shard, folder / f"{len(of_shards)}.part", metadata={"format": "pt"})
        of_shards.append(list(shard))
        total += _num_bytes(shard)
        dtype = next(iter(shard.values())).dtype
        shard.clear()  # or there are two of them when the next one is full
    if len(of_shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(of_shards):
        file = f"model-{number + 1:05d}-of-{len(of_shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return dtype


def state_dtype(path: Path, dtype: torch.dtype) -> None:
    """The config names the dtype that the weights are cast to; untouched if it does already."""
    config = read_json(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    changed = config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    if changed != config:
        path.write_text(json.dumps(changed, indent=2) + "\n", "utf-8")

"""A Hugging Face folder: what it says of its model, and its tensors. Its writer is `hf_writer`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_srpo.types import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REQUIRED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
"""Of config.json, what every model needs."""
COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What safetensors calls them."""
CASTABLE = (*DTYPES, "F64")
"""Whose numbers are weights. Those of eight bits are not, without their scales."""
IGNORED = ".rotary_emb.inv_freq"
"""Computed from config.json, and yet stored in old folders; transformers passes them over, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it: F32, BF16, ..."""


def stated_config(folder: Path) -> dict[str, Any]:
    """config.json, whatever it says. Raises `InputError` where there is none."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a Hugging Face model folder (it has no config.json)")
    return read_json(folder / "config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises `InputError` where there is none, or half of one."""
    config = stated_config(folder)
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise InputError(f"{folder / 'config.json'}: has no {missing[0]!r}")
    for key in COUNTS:
        count = config.get(key)
        if count is not None and not (type(count) is int and count > 0):
            raise InputError(f"{folder / 'config.json'}: {key} must be a number, not {count!r}")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises `InputError` for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping of keys to values")
    return content


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if "weight_map" not in index:
            raise InputError(f"{folder / INDEX}: has no `weight_map`")
        weight_map = index["weight_map"]
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise InputError(f"{folder / INDEX}: `weight_map` must map tensors to file names")
        files = {name: folder / weight_map[name] for name in _used(weight_map)}
        missing = sorted({str(path) for path in files.values() if not path.is_file()})
        if missing:
            raise InputError(f"{folder}: {INDEX} names {missing[0]}, which is not there")
        return files
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX}")
    with _open(folder / SINGLE) as file:
        return dict.fromkeys(_used(file.keys()), folder / SINGLE)


def _used(names: Iterable[str]) -> list[str]:
    """Those of them that are weights."""
    return [name for name in names if not name.endswith(IGNORED)]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor), one at a time."""
    for path in sorted(set(weight_files(folder).values())):
        with _open(path) as file:
            for name in _used(file.keys()):
                yield name, file.get_tensor(name)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the folder's files hold, from their headers. Raises `InputError` where the index says
    otherwise."""
    files = weight_files(folder)
    stored: dict[str, Stored] = {}
    for path in sorted(set(files.values())):
        of_file = _headers(path)
        if strangers := [name for name in of_file if files.get(name) != path]:
            raise InputError(f"{path}: holds {strangers[0]}, which {INDEX} does not say")
        stored |= of_file
    if missing := files.keys() - stored.keys():
        raise InputError(f"{files[min(missing)]}: lacks {min(missing)}, which {INDEX} names")
    return stored


def _headers(path: Path) -> dict[str, Stored]:
    with _open(path) as file:
        headers = {name: file.get_slice(name) for name in _used(file.keys())}
        return {
            name: Stored(file=path, shape=tuple(header.get_shape()), dtype=header.get_dtype())
            for name, header in headers.items()
        }


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor that the model has, a tied head included; nothing is loaded."""
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    if EMBEDDING not in shapes:
        raise InputError(f"{folder}: the weights lack {EMBEDDING}")
    shapes.setdefault(HEAD, shapes[EMBEDDING])
    return shapes


def check_shapes(
    folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """The folder holds what its config.json means, no more and no less."""
    if missing := expected.keys() - stored.keys():
        raise InputError(f"{folder}: the weights lack {min(missing)}")
    if unknown := stored.keys() - expected.keys():
        raise InputError(f"{folder}: weights that the model has no place for: {min(unknown)}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise InputError(
                f"{folder}: {name} has a shape that does not fit config.json "
                f"({stored[name].shape} instead of {shape})"
            )


def one_dtype(folder: Path, stored: Mapping[str, Stored]) -> torch.dtype:
    """That of all tensors; raises `InputError` where they have several, or one that is none of
    `DTYPES`."""
    names = {tensor.dtype: name for name, tensor in sorted(stored.items(), reverse=True)}
    if len(names) > 1:
        some = ", ".join(f"{names[dtype]} is {dtype}" for dtype in sorted(names))
        raise InputError(f"{folder}: weights of several dtypes ({some})")
    (dtype,) = names
    if dtype not in DTYPES:
        raise InputError(f"{folder}: {names[dtype]} is {dtype}, which is not supported")
    return DTYPES[dtype]


def check_castable(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Raises `InputError` where a cast would not mean what the stored numbers mean."""
    for name, tensor in sorted(stored.items()):
        if tensor.dtype not in CASTABLE:
            raise InputError(f"{folder}: {name} is {tensor.dtype}, which is not supported")


def read_finite(
    stored: Mapping[str, Stored], name: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One tensor, cast to `dtype`. Raises `InputError` if a number in it is none then."""
    path = stored[name].file
    with _open(path) as file:
        tensor = file.get_tensor(name).to(dtype)
    check_finite(name, tensor, path)
    return tensor


def check_finite(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Without a temporary of the tensor's size: NaN is both the least and the largest."""
    if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{path}: {name} holds NaN or infinity (as {dtype})")

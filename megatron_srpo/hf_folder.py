"""A Hugging Face folder: what it says of its model, its tensors, and how a new one is written.

A folder is written under a temporary name and renamed: it is whole or it is not there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Not copied into a new folder: they hold the old weights."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises `InputError` where there is none, or half of one."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a Hugging Face model folder (it has no config.json)")
    config = read_json(folder / "config.json")
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise InputError(f"{folder / 'config.json'}: has no {missing[0]!r}")
    for key in COUNTS:
        count = config.get(key)
        if count is not None and not (isinstance(count, int) and count > 0):
            raise InputError(f"{folder / 'config.json'}: {key} must be a number, not {count!r}")
    return config


def completed_config(folder: Path) -> dict[str, Any]:
    """config.json as transformers reads it: with its defaults, old names replaced by new ones."""
    from transformers import AutoConfig  # takes a second, which a mere check need not wait for

    config = AutoConfig.from_pretrained(folder)
    return {key: getattr(config, key) for key in {*config.to_dict(), *config.attribute_map}}


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """As many as query heads where config.json does not say."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def num_experts(config: Mapping[str, Any]) -> int:
    """0 in a model without experts."""
    return config.get("num_experts") or config.get("num_local_experts") or 0


def head_size(config: Mapping[str, Any]) -> int:
    """The hidden size's share where config.json does not say."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


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
        files = {name: folder / file for name, file in index["weight_map"].items()}
        missing = sorted({str(path) for path in files.values() if not path.is_file()})
        if missing:
            raise InputError(f"{folder}: {INDEX} names {missing[0]}, which is not there")
        return files
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX}")
    with _open(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


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
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor that the model has, a tied head included; nothing is loaded."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(weight_files(folder).values())):
        with _open(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if "model.embed_tokens.weight" not in shapes:
        raise InputError(f"{folder}: the weights lack model.embed_tokens.weight")
    shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    return shapes


def write_folder(
    out: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, like: Path, tied: bool
) -> None:
    """Weights from the stream; config, tokenizer and templates copied from the folder `like`.

    A tied head is not stored twice: `lm_head.weight` is left out if `tied`.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_all_but_weights(like, partial)
    weights = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in tensors
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, partial / SINGLE, metadata={"format": "pt"})
    _state_dtype(partial / "config.json", next(iter(weights.values())).dtype)
    partial.rename(out)


def copy_all_but_weights(like: Path, out: Path) -> None:
    """Config, tokenizer and templates, into a new folder."""
    out.mkdir(parents=True)
    for file in sorted(like.iterdir()):
        if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and file.name != INDEX:
            shutil.copyfile(file, out / file.name)


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    """The config names the dtype that the weights are stored in."""
    config = read_json(path)
    named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype")}
    changed = config | {key: value for key, value in named.items() if key in config}
    path.write_text(json.dumps(changed, indent=2) + "\n", "utf-8")

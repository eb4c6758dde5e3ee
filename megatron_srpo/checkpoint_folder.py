"""A checkpoint's folder:  hf/ (all but the weights)  megatron/ (torch_dist)  manifest.json (last)

A folder without its manifest is a half-written one, and a file that is shorter or longer than the
manifest says was not written to its end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_srpo.hf_folder import DTYPES, read_json
from megatron_srpo.types import InputError

MANIFEST = "manifest.json"
FORMAT, VERSION = "megatron_srpo checkpoint", 1
DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What manifest.json says."""

    dtype: str
    """Of the model's weights: float32, bfloat16."""
    contents: tuple[str, ...]
    """`model` always; a training run adds what it needs to go on."""
    files: dict[str, int]
    """Path in the folder -> bytes, of every file but the manifest."""


def hf_part(folder: Path) -> Path:
    """The model's folder without its weights: config, generation config, tokenizer, templates."""
    return folder / "hf"


def megatron_part(folder: Path) -> Path:
    """Megatron's distributed checkpoint, which loads on any layout of processes."""
    return folder / "megatron"


def write_manifest(folder: Path, *, dtype: str, contents: Sequence[str]) -> None:
    """The last thing that is written into a checkpoint; counts the files that are there."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    manifest = Manifest(dtype=dtype, contents=tuple(contents), files=files)
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Raises `InputError` for a folder that is no whole checkpoint; names the file that is not."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: no checkpoint, or one not written to its end (it has no {MANIFEST})"
        )
    content = read_json(path)
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{path}: is not the manifest of a {FORMAT} of version {VERSION}")
    try:
        dtype, contents, files = (content[key] for key in ("dtype", "contents", "files"))
    except KeyError as error:
        raise InputError(f"{path}: has no {error}") from error
    for is_right, expectation in (
        (dtype in DTYPE_NAMES, f"dtype must be one of {', '.join(DTYPE_NAMES)}"),
        (isinstance(contents, list) and "model" in contents, "contents must be a list with model"),
        (_are_sizes(files), "files must map names to numbers of bytes, one at least"),
    ):
        if not is_right:
            raise InputError(f"{path}: {expectation}")
    manifest = Manifest(dtype=dtype, contents=tuple(contents), files=files)
    for name, size in manifest.files.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {MANIFEST} names {name}, which is not there")
        if (found := (folder / name).stat().st_size) != size:
            raise InputError(f"{folder / name}: has {found} bytes, {MANIFEST} says {size}")
    return manifest


def _are_sizes(files: Any) -> bool:
    return (
        isinstance(files, dict)
        and len(files) > 0
        and all(isinstance(size, int) and size >= 0 for size in files.values())
    )

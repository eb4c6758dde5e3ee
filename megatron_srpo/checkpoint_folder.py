"""A checkpoint's folder:  hf/ (all but the weights)  megatron/ (torch_dist)  manifest.json (last)

A folder without its manifest is a half-written one, and a file that is shorter or longer than the
manifest says was not written to its end. A conversion's manifest holds checksums, too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_srpo.hf_folder import DTYPES, read_json
from megatron_srpo.types import InputError

MANIFEST = "manifest.json"
FORMAT, VERSION = "megatron_srpo checkpoint", 1
BLOCK_BYTES = 2**20
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
    crc32: dict[str, int] = field(default_factory=dict)
    """Path in the folder -> CRC-32 of its bytes, or empty: a run has no time to read again what it
    has written."""


def hf_part(folder: Path) -> Path:
    """The model's folder without its weights: config, generation config, tokenizer, templates."""
    return folder / "hf"


def megatron_part(folder: Path) -> Path:
    """Megatron's distributed checkpoint, which loads on any layout of processes."""
    return folder / "megatron"


def write_manifest(
    folder: Path, *, dtype: str, contents: Sequence[str], has_checksums: bool = False
) -> None:
    """The last thing that is written into a checkpoint; counts the files that are there."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    crc32 = {name: _crc32(folder / name) for name in files} if has_checksums else {}
    manifest = Manifest(dtype=dtype, contents=tuple(contents), files=files, crc32=crc32)
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
    crc32 = content.get("crc32", {})
    for is_right, expectation in (
        (dtype in DTYPE_NAMES, f"dtype must be one of {', '.join(DTYPE_NAMES)}"),
        (isinstance(contents, list) and "model" in contents, "contents must be a list with model"),
        (_are_numbers(files) and files, "files must map names to numbers of bytes, one at least"),
        (_are_numbers(crc32), "crc32 must map names to numbers"),
    ):
        if not is_right:
            raise InputError(f"{path}: {expectation}")
    manifest = Manifest(dtype=dtype, contents=tuple(contents), files=files, crc32=crc32)
    if strangers := crc32.keys() - files.keys():
        raise InputError(f"{path}: crc32 names {min(strangers)}, which files does not")
    for name, size in manifest.files.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {MANIFEST} names {name}, which is not there")
        if (found := (folder / name).stat().st_size) != size:
            raise InputError(f"{folder / name}: has {found} bytes, {MANIFEST} says {size}")
    return manifest


def check_checksums(folder: Path, manifest: Manifest) -> None:
    """Reads every byte that the manifest has a checksum of. Raises `InputError` for another one."""
    for name, expected in manifest.crc32.items():
        if _crc32(folder / name) != expected:
            raise InputError(f"{folder / name}: was changed or damaged (another CRC-32)")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _are_numbers(mapping: Any) -> bool:
    return isinstance(mapping, dict) and all(
        isinstance(number, int) and number >= 0 for number in mapping.values()
    )

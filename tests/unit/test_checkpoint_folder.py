"""A checkpoint is complete if its manifest is there and every file is as long as it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_srpo.checkpoint_folder import (
    MANIFEST,
    Manifest,
    check_checksums,
    hf_part,
    megatron_part,
    read_manifest,
    write_manifest,
)
from megatron_srpo.types import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in (hf_part(tmp_path), megatron_part(tmp_path)):
        part.mkdir()
    (hf_part(tmp_path) / "config.json").write_text("{}")
    (megatron_part(tmp_path) / ".metadata").write_bytes(b"12345")
    write_manifest(tmp_path, dtype="bfloat16", contents=["model", "optimizer"])
    return tmp_path


def test_a_manifest_says_what_is_there(folder: Path):
    assert read_manifest(folder) == Manifest(
        dtype="bfloat16",
        contents=("model", "optimizer"),
        files={"hf/config.json": 2, "megatron/.metadata": 5},
    )


def test_what_was_not_in_the_folder_when_it_was_written_is_nobodys_business(folder: Path):
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" not in read_manifest(folder).files


def test_a_byte_that_changed_is_found_where_there_are_checksums(folder: Path):
    metadata = megatron_part(folder) / ".metadata"
    for has_checksums, expected in (
        (True, {"hf/config.json": 0xA3A6BF43, "megatron/.metadata": 0xCBF53A1C}),
        (False, {}),
    ):
        metadata.write_bytes(b"12345")
        contents = ["model", "optimizer"]
        write_manifest(folder, dtype="float32", contents=contents, has_checksums=has_checksums)
        manifest = read_manifest(folder)
        assert manifest.crc32 == expected
        check_checksums(folder, manifest)
        metadata.write_bytes(b"12346")
        read_manifest(folder)
        if has_checksums:
            with pytest.raises(InputError, match=r"megatron/\.metadata: was changed or damaged"):
                check_checksums(folder, manifest)


def test_a_manifest_can_be_written_again(folder: Path):
    first = read_manifest(folder)
    write_manifest(folder, dtype="bfloat16", contents=["model", "optimizer"])
    assert read_manifest(folder) == first


def test_a_folder_without_a_manifest_was_not_written_to_its_end(folder: Path):
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"not written to its end \(it has no manifest\.json\)"):
        read_manifest(folder)


def test_a_file_that_is_missing_or_cut_is_named(folder: Path):
    metadata = megatron_part(folder) / ".metadata"
    metadata.write_bytes(b"1234")
    with pytest.raises(InputError, match=r"megatron/\.metadata: has 4 bytes, .* says 5"):
        read_manifest(folder)
    metadata.unlink()
    with pytest.raises(InputError, match=r"names megatron/\.metadata, which is not there"):
        read_manifest(folder)


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "something else"}])
def test_a_manifest_of_another_format_or_version_is_refused(
    folder: Path, change: dict[str, object]
):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"is not the manifest of a .* of version 1"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
        ({"contents": None}, "contents must be a list with model"),
        ({"contents": "model"}, "contents must be a list with model"),
        ({"contents": ["optimizer"]}, "contents must be a list with model"),
        ({"files": ["hf/config.json"]}, "files must map names to numbers of bytes"),
        ({"files": {}}, "files must map names to numbers of bytes, one at least"),
        ({"crc32": [1]}, "crc32 must map names to numbers"),
        ({"crc32": {"hf/config.json": "2"}}, "crc32 must map names to numbers"),
        ({"crc32": {"elsewhere": 2}}, "crc32 names elsewhere, which files does not"),
        ({"files": 3}, "files must map names to numbers of bytes"),
        ({"files": {"hf/config.json": "2"}}, "files must map names to numbers of bytes"),
    ],
)
def test_a_manifest_of_other_types_is_refused(
    folder: Path, change: dict[str, object], message: str
):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=rf"manifest\.json: {message}"):
        read_manifest(folder)


def test_half_a_manifest_is_refused(folder: Path):
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "files"}))
    with pytest.raises(InputError, match="has no 'files'"):
        read_manifest(folder)
    path.write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        read_manifest(folder)

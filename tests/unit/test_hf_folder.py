"""Hugging Face folders: what is written can be read, is whole or absent, and stores a head once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_srpo.hf_folder import (
    INDEX,
    REQUIRED,
    SINGLE,
    read_config,
    read_tensors,
    tensor_shapes,
    weight_files,
    write_folder,
)
from megatron_srpo.types import InputError

WEIGHTS = {
    "model.embed_tokens.weight": torch.arange(8.0).reshape(4, 2),
    "model.norm.weight": torch.tensor([1.0, -2.0]),
}
HEAD = {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"]}


def model_folder(folder: Path) -> Path:
    """A policy in one file, with its config and tokenizer."""
    folder.mkdir()
    config = dict.fromkeys(REQUIRED, 1) | {"model_type": "tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("tokens")
    save_file({"old": torch.zeros(1)}, folder / SINGLE)
    return folder


def sharded(folder: Path) -> Path:
    """Two files and an index."""
    folder.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        save_file({name: tensor}, folder / f"part{number}.safetensors")
        weight_map[name] = f"part{number}.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / SINGLE, framework="pt") as file:
        return set(file.keys())


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(tensors) == set(expected) and all(
        torch.equal(tensors[name], tensor) for name, tensor in expected.items()
    )


def test_a_tied_head_is_not_stored_twice(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    write_folder(tmp_path / "out", (WEIGHTS | HEAD).items(), like=like, tied=True)
    assert stored_names(tmp_path / "out") == set(WEIGHTS)
    assert same(dict(read_tensors(tmp_path / "out")), WEIGHTS)


def test_a_head_of_its_own_is_stored(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    head = {"lm_head.weight": torch.full((4, 2), 9.0)}
    write_folder(tmp_path / "out", (WEIGHTS | head).items(), like=like, tied=False)
    assert same(dict(read_tensors(tmp_path / "out")), WEIGHTS | head)


def test_config_and_tokenizer_are_copied_and_old_weights_are_not(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    (like / INDEX).write_text('{"weight_map": {}}')
    (like / "pytorch_model.bin").write_text("old weights")
    write_folder(tmp_path / "out", WEIGHTS.items(), like=like, tied=True)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", SINGLE}
    assert read_config(tmp_path / "out") == read_config(like)


def test_the_config_names_the_dtype_that_the_weights_have_now(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    config = read_config(like) | {"dtype": "bfloat16"}
    (like / "config.json").write_text(json.dumps(config))
    write_folder(tmp_path / "out", WEIGHTS.items(), like=like, tied=True)
    assert read_config(tmp_path / "out") == config | {"dtype": "float32"}


def test_tensors_that_share_memory_or_are_transposed_are_stored_as_they_look(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    base = torch.arange(6.0).reshape(2, 3)
    views = {"a": base.T, "b": base[0], "c": torch.nn.Parameter(base)}
    write_folder(tmp_path / "out", views.items(), like=like, tied=False)
    assert same(dict(read_tensors(tmp_path / "out")), {k: v.detach() for k, v in views.items()})


def broken_stream() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.zeros(1)
    raise RuntimeError("the learner died")


def test_a_folder_is_whole_or_absent(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="the learner died"):
        write_folder(out, broken_stream(), like=like, tied=True)
    assert not out.exists()
    # What a broken attempt left does not get into the next one.
    (out.parent / "out.partial" / "stale").write_text("")
    write_folder(out, WEIGHTS.items(), like=like, tied=True)
    assert {f.name for f in out.iterdir()} == {"config.json", "tokenizer.json", SINGLE}
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_the_tensors_of_a_sharded_folder_are_those_of_its_parts(tmp_path: Path):
    folder = sharded(tmp_path / "model")
    assert same(dict(read_tensors(folder)), WEIGHTS)
    assert weight_files(folder)["model.norm.weight"] == folder / "part1.safetensors"


def test_an_index_that_names_a_missing_file_is_an_error_that_names_it(tmp_path: Path):
    folder = sharded(tmp_path / "model")
    (folder / "part1.safetensors").unlink()
    with pytest.raises(InputError, match=r"names .*part1\.safetensors, which is not there"):
        weight_files(folder)


def test_shapes_are_those_of_all_tensors_a_tied_head_included(tmp_path: Path):
    for make in (sharded, model_folder):
        folder = make(tmp_path / make.__name__)
        if make is model_folder:
            save_file(WEIGHTS, folder / SINGLE)
        assert tensor_shapes(folder) == {
            "model.embed_tokens.weight": (4, 2),
            "model.norm.weight": (2,),
            "lm_head.weight": (4, 2),
        }


def test_a_head_of_its_own_keeps_its_own_shape(tmp_path: Path):
    folder = model_folder(tmp_path / "model")
    save_file(WEIGHTS | {"lm_head.weight": torch.zeros(5, 2)}, folder / SINGLE)
    assert tensor_shapes(folder)["lm_head.weight"] == (5, 2)


def test_a_folder_without_config_or_weights_is_an_error_that_says_what_is_missing(tmp_path: Path):
    with pytest.raises(InputError, match=r"it has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(InputError, match=r"no model\.safetensors and no model\.safetensors\.index"):
        weight_files(tmp_path)


def test_unreadable_files_are_errors_of_one_line(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / SINGLE).write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=r"config\.json: not readable as JSON") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="not readable as safetensors") as error:
        weight_files(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_an_unreadable_index_is_an_error_that_names_it(tmp_path: Path, content: str):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)

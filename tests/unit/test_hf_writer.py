"""What is written can be read, is whole or absent, in shards, and stores a head once."""

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
    stored_tensors,
)
from megatron_srpo.hf_writer import state_dtype, write_folder
from megatron_srpo.types import InputError
from tests.unit.full_disk import files_up_to

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
    write_folder(tmp_path / "out", WEIGHTS.items(), like=like, tied=True, is_cast=False)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", SINGLE}
    assert read_config(tmp_path / "out") == read_config(like)


def test_the_config_names_the_dtype_that_the_weights_have_now(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    config = read_config(like) | {"dtype": "bfloat16"}
    (like / "config.json").write_text(json.dumps(config))
    write_folder(tmp_path / "out", WEIGHTS.items(), like=like, tied=True)
    assert read_config(tmp_path / "out") == config | {"dtype": "float32"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"},
         {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_a_dtype_is_stated_where_it_stood_or_in_a_line_of_its_own(
    tmp_path: Path, before: dict[str, str], after: dict[str, str]
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"size": 1} | before))
    state_dtype(path, torch.bfloat16)
    assert json.loads(path.read_text()) == {"size": 1} | after


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
    assert list(out.parent.iterdir()) == []
    write_folder(out, WEIGHTS.items(), like=like, tied=True)
    assert {f.name for f in out.iterdir()} == {"config.json", "tokenizer.json", SINGLE}
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_shards_hold_no_more_than_they_may_and_are_numbered_as_transformers_numbers_them(
    tmp_path: Path,
):
    like = model_folder(tmp_path / "like")
    tensors = {f"t{i}": torch.full((i + 1,), float(i)) for i in range(5)}  # 4, 8, 12, 16, 20 bytes
    write_folder(tmp_path / "out", tensors.items(), like=like, tied=False, max_shard_bytes=24)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 60}
    shard = "model-{:05d}-of-00003.safetensors".format
    assert index["weight_map"] == {
        "t0": shard(1), "t1": shard(1), "t2": shard(1), "t3": shard(2), "t4": shard(3),
    }  # fmt: skip
    assert same(dict(read_tensors(tmp_path / "out")), tensors)
    assert {t.file.name for t in stored_tensors(tmp_path / "out").values()} == {
        path.name for path in (tmp_path / "out").glob("*.safetensors")
    }


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    tensors = {"a": torch.ones(9), "b": torch.ones(1)}
    write_folder(tmp_path / "out", tensors.items(), like=like, tied=False, max_shard_bytes=8)
    assert same(dict(read_tensors(tmp_path / "out")), tensors)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_a_config_that_says_so_already_stays_byte_for_byte(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    content = json.dumps(read_config(like) | {"torch_dtype": "float32"}, indent=7)
    (like / "config.json").write_text(content)
    write_folder(tmp_path / "out", WEIGHTS.items(), like=like, tied=True)
    assert (tmp_path / "out" / "config.json").read_text() == content


def test_without_a_cast_the_config_stays_even_if_it_names_another_dtype(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    content = json.dumps(read_config(like) | {"dtype": "bfloat16"})
    (like / "config.json").write_text(content)
    write_folder(tmp_path / "out", WEIGHTS.items(), like=like, tied=True, is_cast=False)
    assert (tmp_path / "out" / "config.json").read_text() == content


def test_chat_templates_come_along_and_other_indexes_do_not(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    (like / "chat_template.jinja").write_text("{{ messages }}")
    (like / "additional_chat_templates").mkdir()
    (like / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (like / "pytorch_model.bin.index.json").write_text("{}")
    (like / "original").mkdir()
    write_folder(tmp_path / "out", WEIGHTS.items(), like=like, tied=True)
    out = tmp_path / "out"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "tokenizer.json", SINGLE, "chat_template.jinja", "additional_chat_templates",
    }  # fmt: skip


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path):
    like = model_folder(tmp_path / "like")
    tensors = {"small": torch.ones(10), "large": torch.ones(10_000)}
    with (
        files_up_to(10_000),
        pytest.raises(InputError, match="out: a file may not grow that large"),
    ):
        write_folder(tmp_path / "out", tensors.items(), like=like, tied=False, max_shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["like"]

"""Hugging Face folders: what can be read is read, what cannot be is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_srpo.hf_folder import (
    INDEX,
    REQUIRED,
    SINGLE,
    check_finite,
    check_shapes,
    one_dtype,
    read_config,
    read_finite,
    read_tensors,
    stored_tensors,
    tensor_shapes,
    weight_files,
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


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(tensors) == set(expected) and all(
        torch.equal(tensors[name], tensor) for name, tensor in expected.items()
    )


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


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"weight_map": []}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'],
)
def test_an_unreadable_index_is_an_error_that_names_it(tmp_path: Path, content: str):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


def test_stored_tensors_are_known_by_file_shape_and_dtype_without_loading_them(tmp_path: Path):
    folder = sharded(tmp_path / "model")
    stored = stored_tensors(folder)
    assert set(stored) == set(WEIGHTS)
    norm = stored["model.norm.weight"]
    assert (norm.file.name, norm.shape, norm.dtype) == ("part1.safetensors", (2,), "F32")
    assert torch.equal(read_finite(stored, "model.norm.weight"), WEIGHTS["model.norm.weight"])


def test_rotary_frequencies_of_old_folders_are_no_weights(tmp_path: Path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = sharded(tmp_path / "sharded")
    save_file(
        {"model.norm.weight": WEIGHTS["model.norm.weight"], name: torch.ones(1)},
        folder / "part1.safetensors",
    )
    single = model_folder(tmp_path / "single")
    save_file(WEIGHTS | {name: torch.ones(1)}, single / SINGLE)
    index = json.loads((folder / INDEX).read_text())
    for weight_map in (index["weight_map"], index["weight_map"] | {name: "part1.safetensors"}):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        for one in (folder, single):
            assert set(stored_tensors(one)) == set(weight_files(one)) == set(WEIGHTS)
            assert same(dict(read_tensors(one)), WEIGHTS)


def test_an_index_and_its_files_must_agree(tmp_path: Path):
    folder = sharded(tmp_path / "model")
    save_file(
        {"model.norm.weight": torch.ones(2), "more": torch.ones(1)}, folder / "part1.safetensors"
    )
    with pytest.raises(
        InputError, match=r"part1\.safetensors: holds more, which .*index.* not say"
    ):
        stored_tensors(folder)
    save_file({}, folder / "part1.safetensors")
    with pytest.raises(InputError, match=r"part1\.safetensors: lacks model\.norm\.weight"):
        stored_tensors(folder)


def test_a_file_that_was_cut_is_named(tmp_path: Path):
    folder = sharded(tmp_path / "model")
    path = folder / "part1.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"part1\.safetensors: not readable as safetensors"):
        stored_tensors(folder)


SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (SHAPES | {"more": (1,)}, "lack more"),
        ({"model.embed_tokens.weight": (4, 2)}, r"no place for: model\.norm\.weight"),
        (
            SHAPES | {"model.norm.weight": (3,)},
            r"model\.norm\.weight .* \(\(2,\) instead of \(3,\)\)",
        ),
    ],
)
def test_a_folder_holds_what_is_expected_no_more_and_no_less(
    tmp_path: Path, expected: dict[str, tuple[int, ...]], message: str
):
    folder = sharded(tmp_path / "model")
    check_shapes(folder, stored_tensors(folder), SHAPES)
    with pytest.raises(InputError, match=message):
        check_shapes(folder, stored_tensors(folder), expected)


def test_weights_have_one_dtype_that_is_known(tmp_path: Path):
    folder = model_folder(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        save_file({n: t.to(dtype) for n, t in WEIGHTS.items()}, folder / SINGLE)
        assert one_dtype(folder, stored_tensors(folder)) == dtype
    save_file({"a": torch.ones(1), "b": torch.ones(1).bfloat16()}, folder / SINGLE)
    with pytest.raises(InputError, match=r"several dtypes \(b is BF16, a is F32\)"):
        one_dtype(folder, stored_tensors(folder))
    save_file({"a": torch.ones(1, dtype=torch.int8)}, folder / SINGLE)
    with pytest.raises(InputError, match="a is I8, which is not supported"):
        one_dtype(folder, stored_tensors(folder))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_found_wherever_it_stands(number: float, dtype: torch.dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    check_finite("name", tensor, Path("file"))
    tensor[1, 3] = number
    with pytest.raises(InputError, match="file: name holds NaN or infinity"):
        check_finite("name", tensor, Path("file"))


def test_a_number_that_a_cast_makes_infinite_is_found(tmp_path: Path):
    folder = model_folder(tmp_path / "model")
    save_file({"a": torch.tensor([1.0, 3.4e38])}, folder / SINGLE)
    stored = stored_tensors(folder)
    assert read_finite(stored, "a").dtype == torch.float32
    with pytest.raises(InputError, match=r"a holds NaN or infinity \(as bfloat16\)"):
        read_finite(stored, "a", torch.bfloat16)

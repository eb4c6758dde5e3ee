"""Conversion is a bijection on the bits of any model, and refuses by name what is none."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_srpo.checkpoint_folder import hf_part, megatron_part, read_manifest, write_manifest
from megatron_srpo.convert import Layout, _ranks, convert, hf_to_megatron, megatron_to_hf
from megatron_srpo.engines.megatron import torch_dist
from megatron_srpo.engines.megatron.names import Heads, join, part, split, whole
from megatron_srpo.engines.megatron.outline import outline
from megatron_srpo.hf_folder import INDEX, SINGLE
from megatron_srpo.types import InputError
from megatron_srpo.verify import verify
from tests.tiny import FAMILIES, by_stored_name, write_policy
from tests.unit.full_disk import files_up_to

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, torch.Tensor]
CONFIG = {
    "model_type": "qwen2", "vocab_size": 14, "hidden_size": 10, "intermediate_size": 6,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "dtype": "float32", "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def shapes_of(config: dict[str, Any]) -> Shapes:
    """As transformers names and shapes them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stored_names = by_stored_name(dict(model.named_parameters()))
    return {name: tuple(tensor.shape) for name, tensor in stored_names.items()}


def random_bits(shapes: Shapes, dtype: torch.dtype, *, seed: int = 0) -> Weights:
    """Any finite number: negative zeros and subnormal ones too."""
    generator = torch.Generator().manual_seed(seed)
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    limits = torch.iinfo(integers)
    weights: Weights = {}
    for name, shape in shapes.items():
        drawn = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integers)
        numbers = drawn.view(dtype)
        weights[name] = torch.where(numbers.isfinite(), numbers, torch.tensor(-0.0, dtype=dtype))
    return weights


def write_model(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    """Two shards, an index, and what else a folder has."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "generation_config.json").write_text('{"top_p":  0.9}')
    (folder / "tokenizer.json").write_text("tokens")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, half in enumerate((names[::2], names[1::2])):
        file = f"part{number}.safetensors"
        save_file({name: weights[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def stored(folder: Path) -> Weights:
    found: Weights = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def other_files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix != ".safetensors" and path.name != INDEX
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.itemsize])


def assert_same_bits(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hf", CONFIG, random_bits(shapes_of(CONFIG), torch.float32))


@pytest.fixture
def checkpoint(tmp_path: Path, model: Path, mesh: Any) -> Path:
    hf_to_megatron(model, tmp_path / "checkpoint", mesh, layout=Layout())
    return tmp_path / "checkpoint"


# --- a bijection ---------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], Layout, torch.dtype]:
    """Of any family. No two sizes need be alike, and none a power of two."""
    tp, pp = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 2)]))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    num_groups, head_dim = tp * draw(st.integers(1, 2)), 2 * draw(st.integers(1, 3))
    num_heads = num_groups * draw(st.integers(1, 3))
    config = (
        CONFIG
        | FAMILIES[family]
        | {
            "model_type": family,
            "vocab_size": draw(st.integers(1, 300)),
            "hidden_size": num_heads * (head_dim if "olmo" in family else draw(st.integers(1, 4))),
            "intermediate_size": tp * draw(st.integers(1, 5)),
            "moe_intermediate_size": tp * draw(st.integers(1, 5)),
            "num_hidden_layers": pp * draw(st.integers(1, 2)),
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_groups,
            "head_dim": head_dim,
            "tie_word_embeddings": draw(st.booleans()),
        }
    )
    return config, Layout(tp=tp, pp=pp), draw(st.sampled_from([torch.float32, torch.bfloat16]))


@settings(max_examples=15, deadline=None)
@given(case=cases(), most_bytes=st.sampled_from([1, 50, 500, 10**9]), seed=st.integers(0, 99))
def test_a_folder_comes_back_bit_by_bit_whatever_its_shapes(
    mesh: Any, case: tuple[dict[str, Any], Layout, torch.dtype], most_bytes: int, seed: int
):
    """Whatever fits into a shard, and into what is written at once."""
    config, layout, dtype = case
    weights = random_bits(shapes_of(config), dtype, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        hf = write_model(root / "hf", config, weights)
        with patch.object(torch_dist, "MAX_PIECE_BYTES", most_bytes):
            hf_to_megatron(hf, root / "checkpoint", mesh, layout=layout)
        megatron_to_hf(root / "checkpoint", root / "back", mesh, max_shard_bytes=most_bytes)
        assert_same_bits(stored(root / "back"), weights)
        assert other_files(root / "back") == other_files(hf)
        files = {path.name for path in megatron_part(root / "checkpoint").glob("*.distcp")}
        assert files == {f"__{rank}_0.distcp" for rank in range(layout.tp * layout.pp)}


@settings(max_examples=50, deadline=None)
@given(
    num_groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    head_size=st.integers(1, 3),
    behind=st.sampled_from([(), (1,), (5,)]),
)
def test_joining_and_splitting_undo_each_other_and_lose_nothing(
    num_groups: int, per_group: int, head_size: int, behind: tuple[int, ...]
):
    rows = num_groups * head_size
    heads = Heads(num_groups=num_groups, per_group=per_group, vocab_size=rows)
    layouts: dict[Any, tuple[int, ...]] = {
        "qkv": (per_group * rows, rows, rows),
        "gate_up": (rows, rows),
        "copy": (rows,),
        "vocabulary": (rows,),
    }
    for layout, lengths in layouts.items():
        # From 1 on: zeros are what pads a vocabulary.
        numbers = 1 + torch.arange(sum(lengths) * math.prod(behind)).reshape(-1, *behind)
        parts = list(numbers.split(lengths))
        joined = join(layout, parts, heads)
        assert sorted(joined[joined > 0].tolist()) == sorted(numbers.flatten().tolist())
        back = split(layout, joined, heads)
        assert [tuple(one.shape) for one in back] == [tuple(one.shape) for one in parts]
        assert all(torch.equal(one, other) for one, other in zip(back, parts, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    rule=st.sampled_from([("copy", 0), ("copy", 1), ("copy", None), ("gate_up", 0), ("qkv", 0)]),
)
def test_the_shards_of_all_ranks_make_the_whole_and_nothing_else(
    size: int, rows: int, columns: int, rule: Any
):
    layout, dim = rule
    full = torch.arange(4 * size * size * rows * columns).reshape(2 * size * rows, -1)
    shards = [part(layout, full, dim, rank, size) for rank in range(size)]
    assert torch.equal(whole(layout, shards, dim), full)
    if dim is not None:
        assert sum(shard.numel() for shard in shards) == full.numel()
    if layout == "gate_up":  # a rank's gate and up belong to the same neurons
        gate, up = full.chunk(2)
        for shard in shards:
            assert torch.equal(
                shard.chunk(2)[1] - shard.chunk(2)[0], (up - gate)[: len(shard) // 2]
            )


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_every_tensor_of_a_folder_is_in_one_parameter_and_every_number_has_a_place(
    mesh: Any, case: tuple[dict[str, Any], Layout, torch.dtype]
):
    config, _, _ = case
    expected = shapes_of(config)
    with tempfile.TemporaryDirectory() as name:
        found = outline(write_model(Path(name) / "hf", config, {}), mesh)
    names = Counter(hf_name for p in found.parameters for hf_name in found.hf_names(p))
    assert names == Counter(list(expected))
    assert found.hf_shapes() == expected
    num_megatron = sum(math.prod(p.shape) for p in found.parameters.values())
    padding = found.heads.padded_vocab_size - config["vocab_size"]
    padding *= config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2)
    assert num_megatron - padding == sum(math.prod(shape) for shape in expected.values())


def test_each_ranks_file_holds_what_the_rank_would_hold(model: Path, tmp_path: Path, mesh: Any):
    hf_to_megatron(model, tmp_path / "checkpoint", mesh, layout=Layout(tp=2, pp=2))
    metadata = FileSystemReader(megatron_part(tmp_path / "checkpoint")).read_metadata()
    of_file: dict[str, set[tuple[str, int]]] = {f"__{rank}_0.distcp": set() for rank in range(4)}
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            layer = index.offset[0] if "layers" in index.fqn else -1
            of_file[info.relative_path].add((index.fqn.removeprefix("decoder."), layer))
    attention, mlp = "layers.self_attention.linear_", "layers.mlp.linear_"
    divided = {f"{attention}qkv.weight", f"{attention}qkv.bias", f"{attention}proj.weight"}
    divided |= {f"{mlp}fc1.weight", f"{mlp}fc2.weight"}
    whole = {f"{attention}qkv.layer_norm_weight", f"{mlp}fc1.layer_norm_weight"}
    layers = [{(name, layer) for name in divided} for layer in (0, 1)]
    norms = [{(name, layer) for name in whole} for layer in (0, 1)]
    embedding, head = ("embedding.word_embeddings.weight", -1), ("output_layer.weight", -1)
    assert list(of_file.values()) == [
        layers[0] | norms[0] | {embedding},
        layers[0] | {embedding},
        layers[1] | norms[1] | {head, ("final_layernorm.weight", -1)},
        layers[1] | {head},
    ]


def test_experts_are_counted_under_whichever_name_config_json_has_for_them(
    tmp_path: Path, mesh: Any
):
    """transformers writes `num_local_experts`, published folders say `num_experts`."""
    hf = write_policy(tmp_path / "hf", seed=1, family="qwen3_moe", num_layers=4)
    assert "num_local_experts" in json.loads((hf / "config.json").read_text())
    hf_to_megatron(hf, tmp_path / "checkpoint", mesh, layout=Layout(ep=2))
    assert len(list(megatron_part(tmp_path / "checkpoint").glob("*.distcp"))) == 2


def test_experts_are_divided_over_expert_parallel_ranks_within_each_stage():
    experts = [
        f"decoder.layers.{i}.mlp.experts.local_experts.{e}.w" for i in (0, 1) for e in (0, 1)
    ]
    model: Any = SimpleNamespace(parameters=[*experts, "decoder.layers.1.norm"])
    layout = Layout(tp=2, pp=2, ep=2)
    found = _ranks(model, layout)
    assert list(found) == model.parameters
    assert [list(ranks) for ranks in found.values()] == [[0, 1], [2, 3], [4, 5], [6, 7], [4, 5]]


# --- what may be asked for -----------------------------------------------------------------------


def test_a_cast_rounds_every_tensor_and_is_stated_in_the_config(
    model: Path, tmp_path: Path, mesh: Any
):
    weights = stored(model)
    hf_to_megatron(model, tmp_path / "half", mesh, layout=Layout(), dtype=torch.bfloat16)
    assert read_manifest(tmp_path / "half").dtype == "bfloat16"
    megatron_to_hf(tmp_path / "half", tmp_path / "back", mesh)
    assert_same_bits(stored(tmp_path / "back"), {n: t.bfloat16() for n, t in weights.items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    hf_to_megatron(model, tmp_path / "full", mesh, layout=Layout())
    megatron_to_hf(tmp_path / "full", tmp_path / "cast", mesh, dtype=torch.bfloat16)
    assert_same_bits(stored(tmp_path / "cast"), stored(tmp_path / "back"))
    assert other_files(tmp_path / "cast") == other_files(tmp_path / "back")


def test_a_cast_of_a_folder_whose_config_is_silent_is_stated_and_no_cast_is_not(
    tmp_path: Path, mesh: Any
):
    config = {key: value for key, value in CONFIG.items() if key != "dtype"}
    hf = write_model(tmp_path / "hf", config, random_bits(shapes_of(CONFIG), torch.float32))
    for dtype, expected in ((torch.bfloat16, {"dtype": "bfloat16"}), (None, {})):
        root = tmp_path / str(dtype)
        hf_to_megatron(hf, root / "checkpoint", mesh, layout=Layout(), dtype=dtype)
        megatron_to_hf(root / "checkpoint", root / "back", mesh)
        assert json.loads((root / "back" / "config.json").read_text()) == config | expected


def test_a_cast_is_of_numbers_that_mean_themselves_and_have_a_place_in_the_new_dtype(
    model: Path, tmp_path: Path, mesh: Any
):
    rewritten(model, lambda w: w.update({n: t.clamp(-9, 9).double() for n, t in w.items()}))
    hf_to_megatron(model, tmp_path / "fine", mesh, layout=Layout(), dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "fine", tmp_path / "back", mesh)
    assert_same_bits(stored(tmp_path / "back"), {n: t.bfloat16() for n, t in stored(model).items()})
    with pytest.raises(InputError, match="F64, which is not supported"):
        hf_to_megatron(model, tmp_path / "out", mesh, layout=Layout())
    for spoil, message in (
        (with_number(DOWN, 3.4e38), rf"{DOWN} holds NaN or infinity \(as bfloat16\)"),
        (
            lambda w: w.update({DOWN: w[DOWN].float().to(torch.float8_e4m3fn)}),
            f"{DOWN} is F8_E4M3, which is not supported",
        ),
        (lambda w: w.update({DOWN: w[DOWN].to(torch.int8)}), f"{DOWN} is I8, which is not"),
    ):
        rewritten(model, spoil)
        with pytest.raises(InputError, match=message):
            hf_to_megatron(model, tmp_path / "out", mesh, layout=Layout(), dtype=torch.bfloat16)
        assert not (tmp_path / "out").exists()


def test_what_a_cast_on_the_way_back_makes_infinite_is_refused(
    model: Path, tmp_path: Path, mesh: Any
):
    rewritten(model, with_number(DOWN, 3.4e38))
    hf_to_megatron(model, tmp_path / "checkpoint", mesh, layout=Layout())
    with pytest.raises(InputError, match=r"holds NaN or infinity \(as bfloat16\)"):
        megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", mesh, dtype=torch.bfloat16)


def test_rotary_frequencies_that_an_old_folder_stores_are_passed_over(
    model: Path, tmp_path: Path, mesh: Any
):
    weights = stored(model)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in (0, 1)}
    rewritten(model, lambda w: w.update(old))
    hf_to_megatron(model, tmp_path / "checkpoint", mesh, layout=Layout())
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back", mesh)
    assert_same_bits(stored(tmp_path / "back"), weights)


def test_a_source_that_has_the_name_of_a_half_written_output_is_not_touched(
    model: Path, tmp_path: Path, mesh: Any
):
    source = model.rename(tmp_path / "keep.partial")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    hf_to_megatron(source, tmp_path / "keep", mesh, layout=Layout())
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    read_manifest(tmp_path / "keep")


def test_a_layout_has_no_meaning_on_the_way_back(tmp_path: Path):
    for layout in (Layout(tp=2), Layout(pp=2), Layout(ep=2)):
        with pytest.raises(InputError, match="--tp, --pp and --ep divide a checkpoint's files"):
            convert(
                hf=None, checkpoint=tmp_path, out=tmp_path / "out", layout=layout, dtype=None,
                is_verified=False,
            )  # fmt: skip


def test_a_model_of_one_position_is_compared_too(model: Path, tmp_path: Path, mesh: Any):
    changed(model, max_position_embeddings=1)
    rewritten(model, lambda w: [tensor.normal_(0, 0.1) for tensor in w.values()])
    hf_to_megatron(model, tmp_path / "checkpoint", mesh, layout=Layout())
    assert "verified on 2 random tokens" in verify(model, tmp_path / "checkpoint", mesh)


def test_a_config_that_names_another_dtype_than_the_weights_have_stays_as_it_is(
    tmp_path: Path, mesh: Any
):
    weights = random_bits(shapes_of(CONFIG), torch.bfloat16)
    hf = write_model(tmp_path / "hf", CONFIG, weights)
    hf_to_megatron(hf, tmp_path / "checkpoint", mesh, layout=Layout())
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back", mesh)
    assert other_files(tmp_path / "back") == other_files(hf)
    assert_same_bits(stored(tmp_path / "back"), weights)


def test_a_stored_copy_of_a_tied_head_goes_in_and_is_not_stored_twice(tmp_path: Path, mesh: Any):
    config = CONFIG | {"tie_word_embeddings": True}
    weights = random_bits(shapes_of(config), torch.float32)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    hf = write_model(tmp_path / "hf", config, weights | head)
    hf_to_megatron(hf, tmp_path / "checkpoint", mesh, layout=Layout())
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back", mesh)
    assert_same_bits(stored(tmp_path / "back"), weights)


# --- bad folders ---------------------------------------------------------------------------------


def changed(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))


def rewritten(folder: Path, change: Callable[[Weights], object]) -> None:
    """The same folder with other weights, in one file."""
    weights = stored(folder)
    change(weights)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file(weights, folder / SINGLE)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def with_number(name: str, number: float) -> Callable[[Weights], object]:
    return lambda weights: weights[name].view(-1)[3:4].fill_(number)


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: (f / "part1.safetensors").unlink(), "part1.safetensors"),
    "cut shard": (lambda f: cut(f / "part0.safetensors"), "part0.safetensors: not readable"),
    "missing tensor": (lambda f: rewritten(f, lambda w: w.pop(DOWN)), f"lack {DOWN}"),
    "extra tensor": (
        lambda f: rewritten(f, lambda w: w.update(more=torch.ones(1))),
        "no place for: more",
    ),
    "wrong shape": (
        lambda f: rewritten(f, lambda w: w.update({DOWN: torch.ones(6, 10)})),
        f"{DOWN} has a shape that does not fit config.json ((6, 10) instead of (10, 6))",
    ),
    "two dtypes": (
        lambda f: rewritten(f, lambda w: w.update({DOWN: w[DOWN].bfloat16()})),
        f"several dtypes ({DOWN} is BF16",
    ),
    "nan": (lambda f: rewritten(f, with_number(DOWN, math.nan)), f"{DOWN} holds NaN"),
    "infinity": (lambda f: rewritten(f, with_number(DOWN, -math.inf)), f"{DOWN} holds NaN or inf"),
    "unknown architecture": (lambda f: changed(f, model_type="bert"), "'bert' is not supported"),
    "unknown rope": (
        lambda f: changed(f, rope_parameters={"rope_type": "magic"}),
        "'magic' is not supported",
    ),
    "other vocabulary": (lambda f: changed(f, vocab_size=15), "model.embed_tokens.weight has"),
    "more layers": (lambda f: changed(f, num_hidden_layers=3), "lack model.layers.2."),
    "fewer layers": (lambda f: changed(f, num_hidden_layers=1), "no place for: model.layers.1."),
    "other heads": (lambda f: changed(f, num_key_value_heads=4), "k_proj.weight has a shape"),
    "tied": (
        lambda f: changed(f, tie_word_embeddings=True),
        "lm_head.weight is not model.embed_tokens.weight, although config.json has tie_word",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_refused_by_the_name_of_what_is_bad_and_nothing_looks_finished(
    model: Path, tmp_path: Path, mesh: Any, what: str
):
    spoil, message = BAD[what]
    spoil(model)
    with pytest.raises(InputError) as error:
        hf_to_megatron(model, tmp_path / "out", mesh, layout=Layout())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_layout_that_the_model_does_not_divide_over_is_refused(
    model: Path, tmp_path: Path, mesh: Any
):
    for layout, message in (
        (Layout(tp=4), "does not divide by parallel.tp = 4"),
        (Layout(pp=3), "does not divide by parallel.pp x parallel.vpp = 3"),
        (Layout(ep=2), "the model has no experts to share"),
    ):
        with pytest.raises(InputError, match=message):
            hf_to_megatron(model, tmp_path / "out", mesh, layout=layout)


# --- bad checkpoints -----------------------------------------------------------------------------


def respell(checkpoint: Path) -> None:
    """A manifest that fits what is there now."""
    write_manifest(checkpoint, dtype="float32", contents=["model"])


def other_layers(checkpoint: Path) -> None:
    changed(hf_part(checkpoint), num_hidden_layers=3)
    respell(checkpoint)


def no_metadata(checkpoint: Path) -> None:
    (megatron_part(checkpoint) / "metadata.json").unlink()
    respell(checkpoint)


def spoilt(name: str, content: bytes) -> Callable[[Path], object]:
    def spoil(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(content)
        respell(checkpoint)

    return spoil


def no_config(checkpoint: Path) -> None:
    (hf_part(checkpoint) / "config.json").unlink()
    respell(checkpoint)


def scrambled(checkpoint: Path) -> None:
    path = megatron_part(checkpoint) / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    respell(checkpoint)


def one_bit_off(checkpoint: Path) -> None:
    path = megatron_part(checkpoint) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json"),
    "cut file": (lambda c: cut(megatron_part(c) / "__0_0.distcp"), "__0_0.distcp: has"),
    "missing file": (
        lambda c: (megatron_part(c) / "__0_0.distcp").unlink(),
        "megatron/__0_0.distcp, which is not there",
    ),
    "not megatron's": (no_metadata, "megatron/metadata.json: not readable"),
    "no config": (no_config, "it has no config.json"),
    "half a json": (spoilt("megatron/metadata.json", b"{"), "megatron/metadata.json: not readable"),
    "other json": (spoilt("megatron/metadata.json", b"[]"), "megatron/metadata.json: not readable"),
    "no pickle": (spoilt("megatron/.metadata", b"junk"), "megatron/.metadata: not readable"),
    "other module": (
        spoilt("megatron/.metadata", b"cno_module\nname\n."),
        "megatron/.metadata: not readable as part of a distributed checkpoint (ModuleNotFound",
    ),
    "huge pickle": (
        spoilt("megatron/.metadata", b"\x80\x05\x8e" + b"\xff" * 8 + b"."),
        "megatron/.metadata: not readable as part of a distributed checkpoint (",
    ),
    "other pickle": (
        spoilt("megatron/.metadata", pickle.dumps([1])),
        "megatron/.metadata: not readable",
    ),
    "common junk": (spoilt("megatron/common.pt", b"junk"), "megatron/common.pt: not readable"),
    "common empty": (spoilt("megatron/common.pt", b""), "megatron/common.pt: not readable"),
    "other layers": (other_layers, "linear_qkv.layer_norm_weight has a shape"),
    "one bit": (one_bit_off, "megatron/__0_0.distcp: was changed or damaged"),
    "scrambled": (scrambled, "embedding.word_embeddings.weight cannot be read"),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_name_and_nothing_looks_finished(
    checkpoint: Path, tmp_path: Path, mesh: Any, what: str
):
    spoil, message = BAD_CHECKPOINTS[what]
    spoil(checkpoint)
    with pytest.raises(InputError) as error:
        megatron_to_hf(checkpoint, tmp_path / "out", mesh)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_untied_model_lacks_nothing_by_silence(
    model: Path, tmp_path: Path, mesh: Any
):
    """A head that was never written, as if the model had been tied when it was saved."""
    tied = write_model(
        tmp_path / "tied",
        CONFIG | {"tie_word_embeddings": True},
        {n: t for n, t in stored(model).items() if n != "lm_head.weight"},
    )
    hf_to_megatron(tied, tmp_path / "checkpoint", mesh, layout=Layout())
    changed(hf_part(tmp_path / "checkpoint"), tie_word_embeddings=False)
    respell(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"lacks output_layer\.weight"):
        megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", mesh)


def test_a_tensor_of_which_a_part_was_never_written_is_found(
    model: Path, tmp_path: Path, mesh: Any
):
    found, weights = outline(model, mesh), stored(model)
    root = tmp_path / "checkpoint"
    shutil.copytree(model, hf_part(root), ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    with torch_dist.Writer(megatron_part(root)) as writer:
        for name, parameter in found.parameters.items():
            full = found.join(name, [weights[n] for n in found.hf_names(name)])
            # Of two tensor parallel ranks the second one never wrote its half of the embedding.
            ranks = [0]
            if name.startswith("embedding"):
                writer._write_tensor(name, full.shape, (0, 0), full[:7], 0)
            else:
                writer.add(found.state[name], full, dim=parameter.dim, ranks=ranks)
    respell(root)
    with pytest.raises(InputError, match=r"embedding\.word_embeddings\.weight holds NaN"):
        megatron_to_hf(root, tmp_path / "out", mesh)


# --- a full disk ---------------------------------------------------------------------------------


def test_a_disk_that_fills_up_leaves_nothing_in_either_direction(
    checkpoint: Path, model: Path, tmp_path: Path, mesh: Any
):
    before = sorted(path.name for path in tmp_path.iterdir())
    with files_up_to(5000):
        with pytest.raises(InputError, match=r"out: a file may not grow that large; nothing"):
            hf_to_megatron(model, tmp_path / "out", mesh, layout=Layout())
        with pytest.raises(InputError, match=r"out: a file may not grow that large; nothing"):
            megatron_to_hf(checkpoint, tmp_path / "out", mesh)
    assert sorted(path.name for path in tmp_path.iterdir()) == before

"""A family's model computes what transformers computes, and what is none is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_srpo.engines.megatron import families
from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.forward import Forward
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.names import heads_of
from megatron_srpo.engines.megatron.weights import load_hf
from megatron_srpo.hf_folder import HEAD, SINGLE
from megatron_srpo.types import InputError
from tests.tiny import FAMILIES, VOCAB_SIZE, transformers_model, write_policy

TOKENS = np.random.default_rng(0).integers(2, VOCAB_SIZE, 60).astype(np.int32)
"""More than a sliding window, and than the original length of scaled rotary positions."""
on_every_family = pytest.mark.parametrize("family", FAMILIES)


def ours(folder: Path, mesh: Mesh) -> torch.Tensor:
    chunks = build_chunks(folder, mesh, torch.float32)
    load_hf(chunks, folder, mesh)
    (logits,) = Forward(chunks, mesh, heads_of(folder)).logits([TOKENS])
    return logits


@torch.no_grad()
def theirs(folder: Path) -> torch.Tensor:
    return transformers_model(folder)(torch.tensor(TOKENS[None, :-1], dtype=torch.long)).logits[0]


def difference(folder: Path, mesh: Mesh) -> float:
    return float((ours(folder, mesh) - theirs(folder)).abs().max())


def written(folder: Path, family: str = "qwen2", **changed: Any) -> Path:
    return write_policy(folder / family, seed=1, family=family, num_layers=4, **changed)


def stated(folder: Path, **keys: Any) -> Path:
    """The same folder, whose config.json says something else; None: says nothing of it."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_every_family_is_tested():
    assert FAMILIES.keys() == families.FAMILIES.keys()


@on_every_family
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_transformers_in_float64(
    mesh: Mesh, tmp_path: Path, family: str, tied: bool
):
    assert difference(written(tmp_path, family, tied=tied), mesh) <= 1e-5


@on_every_family
@pytest.mark.parametrize("pair", [("q_proj", "k_proj"), ("gate_proj", "up_proj")], ids=" ".join)
def test_two_names_that_a_table_has_exchanged_are_noticed(
    mesh: Mesh, tmp_path: Path, family: str, pair: tuple[str, str]
):
    """With as many key heads as query heads, so that no shape gives it away."""
    folder = written(tmp_path, family, num_key_value_heads=4)
    right = family_of(folder)
    wrong = replace(
        right, layer={name: exchanged(rule, pair) for name, rule in right.layer.items()}
    )
    assert wrong.layer != right.layer
    with mock.patch.dict(families.FAMILIES, {family: wrong}):
        assert difference(folder, mesh) > 1e-2


def exchanged(rule: Any, pair: tuple[str, str]) -> Any:
    layout, names = rule
    one, other = pair
    swap = {one: other, other: one}
    return layout, tuple(
        ".".join(swap.get(word, word) for word in name.split(".")) for name in names
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
        ("qwen2", {"rope_parameters": YARN | {"rope_theta": 1e4, "attention_factor": 1.5}}),
        ("qwen2", {"rope_parameters": None, "rope_theta": 3e5}),
        (
            "qwen3",
            {
                "rope_parameters": None,
                "rope_theta": 1e5,
                "rope_scaling": {"type": "linear", "factor": 3.0},
            },
        ),
        ("qwen3", {"rope_parameters": None}),
        ("olmo3", {"layer_types": None}),
        ("olmo3", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
        ("olmo3", {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": YARN}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"norm_topk_prob": None}),
    ],
)
def test_what_a_config_says_or_leaves_to_transformers_is_taken_as_there(
    mesh: Mesh, tmp_path: Path, family: str, keys: Mapping[str, Any]
):
    assert difference(stated(written(tmp_path, family), **keys), mesh) <= 1e-5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported .supported: llama, olmo2"),
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "ForSequenceClassification.* is not supported .* only Qwen2ForCausalLM",
        ),
        ({"model_type": ["qwen2"]}, "model_type .'qwen2'. is not supported"),
        ({"architectures": "Qwen2ForCausalLM"}, "the architecture Qwen2ForCausalLM is not"),
        ({"is_causal": False}, "is_causal=False is not supported in qwen2 models"),
        ({"num_key_value_heads": 3}, "4 heads do not divide by num_key_value_heads=3"),
        (
            {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
            "qwen2 models with sliding windows are unsupported",
        ),
        ({"layer_types": ["full_attention"]}, "transformers refuses it: .*layer"),
        ({"rms_norm_eps": "small"}, "transformers refuses it"),
        ({"rope_parameters": []}, "rope_parameters must be a mapping"),
        ({"rope_parameters": None, "rope_scaling": "yarn"}, "rope_scaling must be a mapping"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "4"}},
            "factor must be a number, not '4'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "a partial_rotary_factor is not supported",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "full_attention": {"rope_theta": 1e4}}},
            "mixes those of all layers and of types of layers",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported in qwen2 models"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic' is not supported .supported: default, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
            "rope type 'longrope' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'yarn' needs 'original_max_position_embeddings'",
        ),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(
    tmp_path: Path, keys: Mapping[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        family_of(stated(written(tmp_path), **keys))


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("olmo3", {"sliding_window": 0}, "layer_types has sliding windows, but sliding_window is"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 of 4"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "norm_topk_prob with num_experts_per_tok=1"),
        ("qwen3_moe", {"num_experts": "4", "num_local_experts": None}, "transformers refuses it"),
    ],
)
def test_what_would_end_in_the_middle_of_a_run_is_refused(
    tmp_path: Path, family: str, keys: Mapping[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        family_of(stated(written(tmp_path, family), **keys))


@pytest.mark.parametrize(("family", "groups"), [("qwen2", 32), ("qwen3_moe", 4)])
def test_a_size_that_is_left_out_is_its_familys_default(
    mesh: Mesh, tmp_path: Path, family: str, groups: int
):
    sizes = {"num_attention_heads": 2 * groups, "num_key_value_heads": groups, "head_dim": 8}
    folder = stated(written(tmp_path, family, **sizes), num_key_value_heads=None)
    assert difference(folder, mesh) <= 1e-5


def test_a_rope_of_one_type_of_layers_is_looked_at_too(tmp_path: Path):
    rope = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    with pytest.raises(InputError, match="rope type 'dynamic'"):
        family_of(stated(written(tmp_path, "olmo3"), rope_parameters=rope))


def test_padded_rows_of_the_vocabulary_are_never_predicted(mesh: Mesh, tmp_path: Path):
    folder = written(tmp_path)
    chunks = build_chunks(folder, mesh, torch.float32)
    load_hf(chunks, folder, mesh)
    (logprobs,) = Forward(chunks, mesh, heads_of(folder)).sequence_logprobs(
        [TOKENS], temperature=1.0
    )
    right = theirs(folder).log_softmax(-1).gather(1, torch.tensor(TOKENS[1:, None]).long())[:, 0]
    np.testing.assert_allclose(logprobs, right, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights | {"model.extra": torch.zeros(1)}, "no place for: model.extra"),
        (
            lambda weights: weights | {HEAD: torch.zeros(9, 128)},
            "lm_head.weight has 9 rows",
        ),
        (
            lambda weights: {n: w / (n != "model.norm.weight") for n, w in weights.items()},
            "model.norm.weight holds NaN or infinity",
        ),
        (
            lambda weights: {n: w for n, w in weights.items() if "layers.2.mlp.up" not in n},
            "the weights lack model.layers.2.mlp.up_proj.weight",
        ),
    ],
)
def test_weights_that_config_does_not_mean_are_refused(
    mesh: Mesh, tmp_path: Path, change: Any, message: str
):
    folder = written(tmp_path, tied=False)
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)
    with pytest.raises(InputError, match=message):
        ours(folder, mesh)

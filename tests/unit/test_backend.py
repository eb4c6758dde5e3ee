"""Whose layers are chosen, why, and what is refused before anything is built."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_srpo.config import Config
from megatron_srpo.config_file import dump_config, load_config
from megatron_srpo.config_precision import Fp8Config
from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.engines.megatron.backend import (
    Backend,
    Machine,
    check_model,
    check_rollouts,
    choose,
    machine_for,
    this_machine,
)
from megatron_srpo.types import InputError

HERE = Machine(capability=None)
HOPPER = Machine(capability=(9, 0), cuda=(12, 9), engine="2.14.1")
BARE = replace(HOPPER, engine=None, engine_lacks="No module named 'transformer_engine'")
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
MODEL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
}


def config(**values: Any) -> Config:
    given = {"run_dir": "r", "model": "m", "data": {"train": "t"}}
    return Config.model_validate(given | {"eval": {"sets": {"e": {"data": "d"}}}} | values)


def bf16(**values: Any) -> Config:
    return config(dtype="bfloat16", **values)


def refused(cfg: Config, machine: Machine) -> str:
    with pytest.raises(InputError) as error:
        choose(cfg, machine)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("cfg", "machine", "layers", "why"),
    [
        (bf16(), HOPPER, "transformer_engine", "Transformer Engine 2.14.1 on a GPU of .* 9.0"),
        (bf16(), BARE, "local", "cannot be imported .No module named 'transformer_engine'"),
        (bf16(), HERE, "local", "there is no GPU"),
        (config(), HOPPER, "local", "dtype is float32"),
        (bf16(backend="local"), HOPPER, "local", "backend=local"),
        (config(backend="transformer_engine"), HOPPER, "transformer_engine", "2.14.1"),
    ],
)
def test_layers_are_the_engine_s_in_bf16_where_it_and_a_gpu_are_there(
    cfg: Config, machine: Machine, layers: str, why: str
):
    chosen = choose(cfg, machine)
    assert chosen.layers == layers
    (said,) = [note for note in chosen.notes if note.startswith(f"layers: {layers}")]
    assert re.search(why, said)


@pytest.mark.parametrize(
    ("machine", "optimizer"),
    [
        (HOPPER, "Transformer Engine's FusedAdam"),
        (replace(BARE, has_apex=True), "Apex's FusedAdam"),
        (BARE, "torch's AdamW"),
        (HERE, "torch's AdamW"),
    ],
)
def test_the_log_says_whose_optimizer_it_is(machine: Machine, optimizer: str):
    assert f"optimizer: {optimizer}" in choose(bf16(), machine).notes


def test_gradients_are_added_up_in_a_kernel_only_by_the_engine_s_layers_and_with_apex():
    with_apex = replace(HOPPER, has_fused_gradients=True)
    assert choose(bf16(), with_apex).fuses_gradients
    assert not choose(bf16(), HOPPER).fuses_gradients
    assert not choose(bf16(backend="local"), with_apex).fuses_gradients


def test_this_machine_is_not_asked_for_what_needs_a_gpu():
    assert this_machine() == HERE


def test_a_rank_beyond_a_node_s_gpus_is_left_to_whoever_compares_nodes(
    monkeypatch: pytest.MonkeyPatch,
):
    """torch knows no device 5 of 4: a traceback, where `preflight` has a line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", ([(9, 0)] * 4).__getitem__)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert this_machine().capability == (9, 0)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"backend": "transformer_engine"},
        {"fp8": {"rollout": True}},
        *({"fp8": {"recipe": recipe, "rollout": True}} for recipe in RECIPES),
    ],
)
def test_a_job_can_be_planned_for_machines_that_have_what_it_names(values: dict[str, Any]):
    cfg = bf16(**values)
    choose(cfg, machine_for(cfg))
    assert machine_for(cfg) == HERE or refused(cfg, HERE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_that_megatron_would_ignore_is_refused(recipe: str):
    cfg = bf16(fp8={"recipe": recipe})
    assert f"fp8.recipe={recipe}: there is no GPU" in refused(cfg, HERE)
    assert "would be ignored" in refused(cfg, BARE)
    assert "backend=transformer_engine: there is no GPU" in refused(
        bf16(backend="transformer_engine"), HERE
    )


@pytest.mark.parametrize(
    ("recipe", "least", "below"),
    [
        ("delayed", (8, 9), (8, 6)),
        ("tensorwise", (8, 9), (8, 0)),
        ("blockwise", (9, 0), (8, 9)),
        ("mxfp8", (10, 0), (9, 0)),
        ("mxfp8", (10, 3), (12, 0)),
    ],
)
def test_a_recipe_needs_a_gpu_that_can(recipe: str, least: tuple[int, int], below: tuple[int, int]):
    cfg = bf16(fp8={"recipe": recipe})
    assert choose(cfg, replace(HOPPER, capability=least)).fp8.recipe == recipe
    assert f"fp8.recipe={recipe} needs compute capability" in refused(
        cfg, replace(HOPPER, capability=below)
    )


def test_scaling_blocks_needs_a_cuda_that_can():
    said = refused(bf16(fp8={"recipe": "blockwise"}), replace(HOPPER, cuda=(12, 8)))
    assert "CUDA 12.9 or later, not 12.8" in said


@pytest.mark.parametrize("machine", [HERE, replace(HOPPER, capability=(8, 0))])
def test_fp8_rollouts_need_a_gpu_that_can_in_training_and_in_evaluation(machine: Machine):
    assert "fp8.rollout needs a GPU" in refused(bf16(fp8={"rollout": True}), machine)
    with pytest.raises(InputError, match=r"fp8\.rollout needs a GPU of compute capability 8\.9"):
        check_rollouts(Fp8Config(rollout=True), machine)


def test_fp8_rollouts_need_nothing_of_the_trainer():
    assert choose(bf16(fp8={"rollout": True}), BARE).layers == "local"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp8": {"recipe": "delayed"}, "dtype": "float32"}, "fp8 needs dtype=bfloat16"),
        ({"fp8": {"rollout": True}, "dtype": "float32"}, "fp8 needs dtype=bfloat16"),
        ({"fp8": {"recipe": "delayed"}, "backend": "local"}, "would ignore it"),
        ({"fp8": {"param_gather": True}}, "need a recipe"),
        ({"fp8": {"first_last_bf16": 1}}, "need a recipe"),
        ({"fp8": {"recipe": "delayed", "first_last_bf16": 1}}, "does not go with recipe=delayed"),
        (
            {"fp8": {"recipe": "blockwise", "param_gather": True}, "loss": {"kl_coef": 0.1}},
            "does not go with loss.kl_coef",
        ),
        (
            {"fp8": {"recipe": "mxfp8", "param_gather": True}, "parallel": {"overlap": True}},
            "does not go with parallel.overlap",
        ),
        (
            {
                "fp8": {"recipe": "mxfp8", "param_gather": True},
                "colocation": {"park": ("gradients", "weights")},
            },
            "colocation.park=weights does not go with",
        ),
        (
            {"fp8": {"recipe": "delayed", "param_gather": True}},
            "param_gather does not go with recipe=delayed",
        ),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        bf16(**values) if "dtype" not in values else config(**values)


def checked(recipe: str = "blockwise", first_last: int = 0, **sizes: Any) -> None:
    parallel = ParallelConfig(**{k: v for k, v in sizes.items() if k in ("tp", "pp", "cp", "ep")})
    changed = {k: v for k, v in sizes.items() if k not in ("tp", "pp", "cp", "ep")}
    fp8 = Fp8Config.model_construct(recipe=recipe, first_last_bf16=first_last)
    check_model(Backend(layers="transformer_engine", fp8=fp8), MODEL | changed, parallel)


def test_a_model_whose_widths_divide_is_taken():
    for recipe in RECIPES:
        checked(recipe)
    checked(tp=2, pp=2, cp=2)
    checked(tp=4, head_dim=8)  # two key-value heads, each whole on two processes
    checked("none", hidden_size=520, head_dim=64, intermediate_size=1023)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 520, "head_dim": 64}, "16: the model's hidden_size .*, 520, does not"),
        ({"intermediate_size": 1040, "tp": 2}, "intermediate_size on each of .*tp=2.*, 520,"),
        ({"recipe": "mxfp8", "intermediate_size": 1040}, "divide by 32: .*intermediate_size"),
        ({"moe_intermediate_size": 24}, "moe_intermediate_size"),
        ({"head_dim": 40, "num_attention_heads": 3}, "queries on each"),
        ({"head_dim": 36}, "head size, 36, does not divide by 8"),
        ({"first_last": 5, "pp": 2}, "first_last_bf16=5 is more than the 4 layers of a stage"),
        (
            {"recipe": "none", "cp": 2, "layer_types": ["sliding_attention"] * 8},
            "parallel.cp=2: .* sliding windows",
        ),
    ],
)
def test_shapes_that_the_engine_could_not_multiply_are_refused(sizes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        checked(**sizes)


def test_local_layers_take_any_shape():
    fp8 = Fp8Config()
    model = MODEL | {"head_dim": 36, "layer_types": ["sliding_attention"]}
    check_model(Backend(layers="local", fp8=fp8), model, ParallelConfig(cp=2))


def test_a_precision_has_its_own_bounds_and_fp8_truncates_importance_weights():
    exact, coarse = config(), bf16()
    trained, sampled = bf16(fp8={"recipe": "blockwise"}), bf16(fp8={"rollout": True})
    assert [c.precision for c in (exact, coarse, trained, sampled)] == [
        "float32", "bfloat16", "fp8", "fp8",
    ]  # fmt: skip
    assert exact.max_logprob_diff == 1e-5
    bounds = [c.mismatch.max_kl for c in (exact, coarse, trained)]
    assert bounds == sorted(bounds) and len(set(bounds)) == 3
    assert [c.loss.importance for c in (exact, coarse, trained, sampled)] == [
        "none", "none", "token_truncate", "token_truncate",
    ]  # fmt: skip


def test_what_the_user_says_is_what_is_meant():
    cfg = bf16(
        fp8={"recipe": "blockwise"}, loss={"importance": "none"}, mismatch={"max_kl": 0.5},
        max_logprob_diff=0.1,
    )  # fmt: skip
    assert cfg.loss.importance == "none"
    assert (cfg.mismatch.max_kl, cfg.max_logprob_diff) == (0.5, 0.1)
    assert cfg.mismatch.max_mean == bf16(fp8={"recipe": "blockwise"}).mismatch.max_mean
    assert Config.model_validate(dict(cfg)) == cfg


def test_a_dumped_config_means_the_same(tmp_path: Path):
    cfg = bf16(fp8={"recipe": "blockwise", "rollout": True})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(cfg))
    assert load_config(path) == cfg


@pytest.mark.parametrize(
    ("recipe", "multiple"),
    [("none", 1), ("delayed", 16), ("tensorwise", 16), ("blockwise", 16), ("mxfp8", 32)],
)
def test_a_recipe_says_how_many_tokens_are_multiplied_at_a_time(recipe: Any, multiple: int):
    assert Fp8Config(recipe=recipe).token_multiple == multiple

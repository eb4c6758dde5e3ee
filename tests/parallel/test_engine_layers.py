"""Layers of Transformer Engine are wired as local ones are, and FP8 as Megatron means it.

On a stand-in, in processes of their own: Megatron decides when it is imported. What Transformer
Engine itself computes, `tools/gpu_check.py` asks on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.environment import unlaunched
from tests.tiny import FAMILIES

SHARED = ("qwen2", "olmo3", "qwen3_moe")
"""As in `engine_layers`, which imports Megatron."""

ROOT = Path(__file__).parents[2]
everywhere = pytest.mark.parametrize(
    ("family", "processes"),
    [*((family, "alone") for family in FAMILIES), *((family, "shared") for family in SHARED)],
)


def found(folder: Path, processes: int) -> dict[str, Any]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = {"PYTHONPATH": f"{Path(__file__).parent / 'stand_in'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.parallel.engine_layers", folder],
        # A fused SwiGLU is compiled, which takes a CPU longer than all the rest.
        env=unlaunched() | paths | {"TORCH_COMPILE_DISABLE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(tmp_path_factory.mktemp("alone"), 1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes, tensor parallel and sequence parallel."""
    return found(tmp_path_factory.mktemp("shared"), 2)


@everywhere
def test_engine_layers_take_and_give_the_same_weights_and_compute_the_same(
    request: pytest.FixtureRequest, family: str, processes: str
):
    these = request.getfixturevalue(processes)[family]
    assert these["weights in and out"]
    assert these["loss"] <= 1e-6 and these["gradient norm"] <= 1e-5
    assert these["gradients"] <= 5e-6


@everywhere
def test_a_checkpoint_is_the_same_whichever_layers_wrote_it(
    request: pytest.FixtureRequest, family: str, processes: str
):
    these = request.getfixturevalue(processes)[family]
    assert these["keys"]
    for way in ("local to engine", "engine to local") if family in SHARED else ():
        assert these[way]
        assert these[f"{way}, goes on"] <= 1e-6


def test_fp8_reaches_every_layer_but_the_first_and_the_last_that_are_to_stay_bf16(
    alone: dict[str, Any],
):
    assert alone["delayed"]["layers with scales"] == [0, 1, 2, 3]
    assert alone["blockwise"]["layers with scales"] == [1, 2]


def test_megatron_is_told_format_recipe_and_history(alone: dict[str, Any]):
    assert alone["delayed"]["config"] == ["hybrid", "delayed", 1024]
    assert alone["blockwise"]["config"][:2] == ["e4m3", "blockwise"]


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_fp8_scales_are_in_the_checkpoint_and_log_probs_are_fp32(
    alone: dict[str, Any], recipe: str
):
    assert alone[recipe]["scales are kept"]
    assert alone[recipe]["dtypes"] == ["float32"]


def test_of_weights_held_in_fp8_the_masters_are_the_folder_s_and_what_leaves_is_bf16(
    alone: dict[str, Any],
):
    held = alone["held"]
    assert held["masters"] and held["plain"]
    # Four linears in each of two layers, seven tensors of a folder; e4m3 has three bits.
    assert held["rounded"] == 14 and 1e-4 < held["far"] <= 2**-4

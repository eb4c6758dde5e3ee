"""The plan against torch's own accounting: real learners, and Megatron's models without memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.plan.hardware import GPUS
from megatron_srpo.plan.memory import (
    fused_head_bytes,
    optimizer_bytes,
    reference_head_bytes,
    weight_bytes,
)
from megatron_srpo.plan.parameters import counts_of
from megatron_srpo.plan.setup import Setup
from megatron_srpo.plan.shape import SHAPES, read_shape
from tests.parallel.plan_jobs import head_bytes, held_bytes, parameter_counts
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, write_policy
from tests.unit.builders import config

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family."""
    folder = tmp_path_factory.mktemp("policies")
    return {
        family: write_policy(
            folder / family, seed=0, family=family, num_layers=4, tied=family != "olmo3"
        )
        for family in FAMILIES
    }


@pytest.mark.parametrize(
    ("num", "parallel", "families"),
    [
        (1, {}, [*FAMILIES]),
        (2, {"tp": 2}, [*FAMILIES]),
        (4, {"tp": 2, "pp": 2}, ["llama"]),
        (4, {"pp": 2, "vpp": 2}, ["qwen3_moe"]),
        (4, {"cp": 2}, ["qwen2"]),
        (4, {"tp": 2, "ep": 2}, ["qwen3_moe"]),
    ],
    ids=str,
)
def test_the_plan_is_what_real_learners_hold(
    pool: Pool, policies: dict[str, Path], num: int, parallel: dict[str, int], families: list[str]
) -> None:
    folders = [policies[family] for family in families]
    dtypes = [getattr(torch, dtype) for dtype in DTYPES]
    for rank in pool.run(num, held_bytes, folders, dtypes, **parallel):
        for folder, by_dtype in zip(folders, rank, strict=True):
            for dtype, (stage, *held) in zip(DTYPES, by_dtype, strict=True):
                cfg = config(dtype=dtype).model_copy(
                    update={"parallel": ParallelConfig(**parallel)}
                )
                setup = Setup(cfg=cfg, shape=read_shape(folder), gpu=GPUS["h100"], num_gpus=num)
                counts = counts_of(setup.shape, cfg.parallel, stage)
                planned = [
                    weight_bytes(setup, counts), 4 * counts.total, optimizer_bytes(setup, counts)
                ]  # fmt: skip
                assert planned == pytest.approx(held, rel=0.05), (folder.name, dtype)


@pytest.mark.parametrize(
    ("num", "parallel"),
    [
        (1, {}),
        (4, {"tp": 4}),
        (4, {"pp": 4}),
        (4, {"tp": 2, "pp": 2}),
        (2, {"pp": 2, "vpp": 4}),
        (4, {"tp": 2, "ep": 4}),
        (4, {"ep": 2}),
    ],
    ids=str,
)
def test_parameters_are_counted_as_megatron_makes_them(
    pool: Pool, tmp_path: Path, num: int, parallel: dict[str, int]
) -> None:
    folders = [folder for folder in sorted(SHAPES.iterdir()) if folder.is_dir()]
    if "ep" in parallel:
        folders = [write_policy(tmp_path, seed=0, family="qwen3_moe", num_layers=4)]
    layout = ParallelConfig(**parallel)
    for rank in pool.run(num, parameter_counts, folders, **parallel):
        for folder, (stage, dense, experts) in zip(folders, rank, strict=True):
            counts = counts_of(read_shape(folder), layout, stage)
            assert (counts.dense, counts.experts) == (dense, experts), folder


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_are_what_the_heads_allocate(pool: Pool, tp: int) -> None:
    num, hidden, columns = 256, 128, 20_000
    for held in pool.run(tp, head_bytes, num, hidden, columns, tp=tp):
        planned = {
            "fused": fused_head_bytes(num, columns, hidden, 4),
            "reference": reference_head_bytes(num, columns, hidden, 4),
        }
        assert planned == pytest.approx(held, rel=0.05)

"""Gradients are measured by the run's own parts, and measuring changes nothing."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from tools.studies.alignment import Alignment, Cell, cell, read
from tools.studies.gradients import Size, measure
from tools.studies.regimes import REGIMES

pytestmark = pytest.mark.slow

TINY = Size(
    num_batches=3,
    baseline_batches=3,
    batch_tokens=600,
    num_measured=8,
    reference_prompts=64,
    reference_rollouts=16,
)
GRPO, HALF, CHAIN = (cell("h8", "start", arm) for arm in ("grpo", "half", "chain26"))


def test_an_arm_s_gradient_is_the_same_alone_and_after_others(tmp_path: Path) -> None:
    REGIMES["h8"].prepare()

    def measured(cells: list[Cell], path: Path) -> dict[Cell, Alignment]:
        settings = {"lr": None, "commit": "", "tell": print, "size": TINY}
        pool.submit(measure, cells, path, **settings).result()
        return {of: replace(one, seconds=0.0) for of, one in read(path).items()}

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # it keeps its engines
        together = measured([GRPO, HALF, CHAIN], tmp_path / "together.jsonl")
        alone = measured([CHAIN], tmp_path / "alone.jsonl")
    assert alone == {CHAIN: together[CHAIN]}
    assert together[GRPO].tokens == together[HALF].tokens
    assert together[GRPO].cosines != together[HALF].cosines
    assert together[CHAIN].predicted and together[GRPO].predicted is None

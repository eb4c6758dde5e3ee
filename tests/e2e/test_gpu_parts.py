"""The parts of `tools/gpu_check.py` that need both engines, small, on a CPU.

`loop` is the real command, which test_command_line.py runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import gpu_check

RUN = {
    "te": {f"local: {family}" for family in ("qwen2", "qwen3", "llama", "olmo2", "olmo3")},
    "colocation": {"float32: probe"},
    "shapes": {"smoke: a step", "smoke: sync", "smoke: seeding"},
}
"""What is pass without a GPU."""


@pytest.mark.parametrize("part", RUN)
def test_what_can_be_checked_without_a_gpu_passes_and_the_rest_was_not_run(
    tmp_path: Path, part: str
) -> None:
    assert gpu_check.main([part, "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"{part}.json").read_text())["results"]
    passed = {r["name"] for r in results if r["status"] == "pass"}
    assert all(any(wanted in name for name in passed) for wanted in RUN[part]), results
    for result in results:
        assert (result["status"] == "not_run") == (not result["numbers"])

"""`train --profile` on real engines: a trace, and a page whose numbers add up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_srpo.profile.kernels import IDLE, by_phase
from tests.e2e.small_run import write_small_run
from tests.launch import start


def test_a_profile_shows_every_phase_of_its_steps_and_what_ran_in_it(tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    run = tmp_path / "profiled"
    process = start("train", config, f"run_dir={run}", "num_steps=3", "--profile", "steps=1:3")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    page = (run / "profile" / "summary.md").read_text()
    assert page in said
    found = by_phase(json.loads((run / "profile" / "trace.json").read_text())["traceEvents"])
    assert {"sync", "generate", "train", "journal", "checkpoint"} <= found.keys()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("train", "generate"):
        seconds = sum(row[f"time/{name}_s"] for row in rows[1:3])
        assert found[name].wall == pytest.approx(seconds, rel=0.05)
        assert found[name].by_family["GEMM"] > 0
        own = sum(found[name].by_family.values())
        assert found[name].idle + own == pytest.approx(found[name].wall, rel=0.25)
    assert found["train"].by_family["optimizer"] > 0
    trained = sum(row["tokens/trained"] for row in rows[1:3])
    assert f"- trained: {trained:.0f} tokens" in page and "MFU n/a" in page
    assert re.search(rf"\| phase .*\| {IDLE} \|", page)

"""The checker of what needs a GPU: on a CPU its checks run small, and no time is claimed."""

from __future__ import annotations

import json
import math
import os
import re
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.turns import TakeTurns
from tools import gpu_check
from tools.gpu import cycle, inputs, kernel_speed, rivals, sanitizer, shapes
from tools.gpu.apart import run_apart
from tools.gpu.result import NotRun, Result, judged, run_check
from tools.gpu.timing import Timing

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
(SMOKE,) = inputs.SMOKE


def test_on_a_cpu_everything_is_right_and_nothing_is_timed(tmp_path: Path):
    assert gpu_check.main(["kernels", "--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["counts"]["fail"] == 0 and report["counts"]["pass"] >= 20
    timed = [r for r in report["results"] if re.match("speed|rivals|sanitizer", r["name"])]
    assert len(timed) > 15
    for result in report["results"]:
        assert (result["status"] == "not_run") == bool(result["reason"])
        assert result["status"] == "pass" or not result["numbers"]
    assert all(r["status"] == "not_run" and r["reason"] == "no GPU" for r in timed)
    assert "no GPU" in report["device"] and report["versions"]["torch"]


def test_only_what_is_asked_for_runs_and_not_beyond_the_budget(tmp_path: Path):
    found = gpu_check.run("kernels", CPU, only="duplicate", budget_s=60)
    assert [(r.name, r.status) for r in found] == [("duplicate rows", "pass")]
    found = gpu_check.run("kernels", CPU, only="rows", budget_s=-1)
    assert {r.status for r in found} == {"not_run"} and "budget" in found[0].reason


def test_a_number_over_its_bound_or_not_a_number_fails():
    assert judged("x", {"error": 1.0}, {"error": 1.0}).status == "pass"
    assert judged("x", {"error": 1.1}, {"error": 1.0}).status == "fail"
    assert judged("x", {"error": math.nan}, {"error": 1.0}).status == "fail"
    assert judged("x", {}, {"error": 1.0}).status == "fail"


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an illegal instruction")


def test_a_check_that_breaks_has_failed_and_one_that_lacks_something_was_not_run():
    def lacking() -> Any:
        raise NotRun("no nvcc")

    assert run_check("x", broken).reason == "RuntimeError: an illegal instruction"
    assert run_check("x", broken).status == "fail"
    assert run_check("x", lacking).status == "not_run"
    assert gpu_check.settled("x", broken)[0].status == "fail"


def one_call(works: dict[str, Any]) -> dict[str, Timing]:
    """Of each, in place of a GPU's time; the floors take a quarter as long."""
    for work in works.values():
        work()
    return {
        name: Timing(
            median_ms=1.0 if "product" in name or name == "copy" else 3.2,
            spread_ms=0.1,
            peak_gib=0.01,
        )
        for name in works
    }


def test_every_work_that_is_timed_runs_and_is_compared_with_its_floor(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(kernel_speed, "measure", one_call)
    found = {r.name.split(", ", 2)[2]: r for r in kernel_speed.speed(SMOKE, CPU)}
    assert set(kernel_speed.names_of_size()) <= set(found)
    assert found["head forward"].numbers["ratio"] == 3.2
    assert found["head forward"].status == "fail"
    assert found["logits forward"].numbers["ratio"] == 6.4
    assert found["one pass"].numbers["ratio"] == pytest.approx(3.2 / 3, abs=1e-4)
    assert found["one pass"].status == "pass"
    half = found["head both ways, 0.5 of the rows"]
    assert half.status == "fail" and half.numbers["of_all_rows"] == 1


def test_a_work_that_breaks_fails_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_speed, "measure", one_call)
    monkeypatch.setattr(kernel_speed, "linear_logprob", broken)
    found = {r.name.split(", ", 2)[2]: r for r in kernel_speed.speed(SMOKE, CPU)}
    assert found["head backward"].status == "fail" and "illegal" in found["head backward"].reason
    assert found["head both ways, 1 of the rows"].status == "fail"
    assert found["one pass"].status == "pass" and found["logits forward"].numbers["ratio"] == 6.4


def test_what_follows_the_loss_of_the_device_is_not_run_and_results_are_saved_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    ran: list[str] = []
    names = ["right", "wrong", "late", "later"]

    def task(name: str) -> list[Result]:
        ran.append(name)
        return [judged(name, {})]

    monkeypatch.setitem(
        gpu_check.PARTS, "kernels", lambda *_: ((name, partial(task, name)) for name in names)
    )
    monkeypatch.setattr(gpu_check, "is_lost", lambda device: ran[-1] == "wrong")
    saved: list[int] = []
    found = gpu_check.run(
        "kernels", CPU, only="", budget_s=60, save=lambda results: saved.append(len(results))
    )
    assert ran == ["right", "wrong"] and saved == [1, 2, 3, 4]
    assert [r.reason for r in found] == ["", "", *["device lost by wrong"] * 2]
    monkeypatch.setattr(kernel_speed, "is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="x: an illegal instruction"):
        kernel_speed.failures({"x": broken, "y": broken}, "", CPU)


def test_the_sanitizer_looks_at_the_cuda_kernel_alone_for_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    device, binary = torch.device("cuda"), tmp_path / "compute-sanitizer"
    binary.write_text('#!/bin/sh\necho "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING >&2\nexit 9')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sanitizer, "what_lacks", lambda device, binary: "")
    monkeypatch.setattr(sanitizer, "PROGRAM", "the program")
    (found,) = sanitizer.sanitized("racecheck", device, time.monotonic() + 60)
    assert found.status == "fail"
    assert found.reason.startswith(
        "--tool racecheck --kernel-regex kns=logits_policy_loss --report-api-errors no"
    )
    assert found.reason.endswith("-c the program 1")
    binary.write_text("#!/bin/sh\nexec sleep 60")
    (found,) = sanitizer.sanitized("racecheck", device, time.monotonic())
    assert found.status == "not_run" and found.reason == "not done in 1 s"


def test_launches_and_microseconds_have_bounds(monkeypatch: pytest.MonkeyPatch):
    def two_launches(work: Any) -> tuple[int, float]:
        work()
        return 2, 9.0

    monkeypatch.setattr(kernel_speed, "kernels_of", two_launches)
    assert [r.status for r in kernel_speed.launches(CPU)] == ["fail", "fail"]


def test_rivals_that_are_not_here_are_not_run_and_those_that_are_have_an_error(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(kernel_speed, "measure", one_call)
    kept = {
        name: rivals.RIVALS[name] for name in ("torch eager", "quack chunked linear cross entropy")
    }
    monkeypatch.setattr(kernel_speed, "RIVALS", kept)
    found = {r.name.split(", ")[2]: r for r in kernel_speed.rivals(SMOKE, CPU, math.inf)}
    assert found["ours"].numbers["error_nats"] < 5e-6
    assert found["torch eager"].numbers["error_nats"] < 0.05
    assert found["quack chunked linear cross entropy"].status == "not_run"
    assert "quack" in found["quack chunked linear cross entropy"].reason


def test_ours_that_breaks_has_failed_and_no_rival_begins_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(kernel_speed, "measure", one_call)
    monkeypatch.setattr(kernel_speed, "linear_logprob", broken)
    monkeypatch.setattr(kernel_speed, "RIVALS", {"torch eager": lambda: broken})
    status = {r.name.split(", ")[2]: r.status for r in kernel_speed.rivals(SMOKE, CPU, math.inf)}
    assert status == {"ours": "fail", "torch eager": "not_run"}
    late = kernel_speed.rivals(SMOKE, CPU, 0.0)
    assert {(r.status, r.reason) for r in late} == {("not_run", "the budget was spent")}


def test_parts_without_a_gpu_run_nothing_that_needs_one():
    for part in ("te", "fp8", "colocation", "shapes"):
        tasks = dict(gpu_check.PARTS[part](CPU, math.inf))
        assert tasks and gpu_check.PARTS.keys() >= {"kernels", "loop", part}
        for name, task in tasks.items():
            if not re.search("local|float32|smoke", name):
                assert [r.status for r in task()] == ["not_run"], name


@pytest.mark.parametrize(
    "name, status, reason",
    [
        ("right", "pass", ""),
        ("refused", "not_run", "this build has no such layers"),
        ("broken", "fail", "RuntimeError: exit code 1: RuntimeError: an illegal instruction"),
    ],
)
def test_a_process_of_its_own_gives_results_or_the_reason_why_not(
    name: str, status: str, reason: str
):
    found = run_apart(name, "tests.unit.talks:talks", {"name": name})
    assert (found[0].name, found[0].status, found[0].reason) == (name, status, reason)
    assert len(found) == (2 if name == "right" else 1)
    assert found[0].numbers == ({"x": 1.0} if name == "right" else {})


def test_a_process_that_is_not_done_in_time_says_nothing():
    (found,) = run_apart("slow", "tests.unit.talks:talks", {"name": "slow"}, time.monotonic() + 1)
    assert found.status == "not_run" and "not done in 1 s" in found.reason


def test_overhead_is_what_no_work_claims_and_fp8_s_share_needs_both_times():
    row = {"time/generate_s": 5.0, "time/train_s": 3.0, "time/sync_s": 1.0, "time/step_s": 10.0}
    assert cycle.overhead(row) == pytest.approx(0.1)
    times = {"14B widths, bf16": 4.0}
    result = run_check("x", partial(shapes.share, "14B", times))
    assert result.status == "not_run" and "no time of 14B widths, FP8" in result.reason
    times["14B widths, FP8"] = 3.1
    result = run_check("x", partial(shapes.share, "14B", times))
    assert result.status == "fail" and result.numbers["share"] == pytest.approx(0.775)


def test_what_lay_idle_in_the_allocator_is_no_memory_that_a_trainer_has_lent(
    monkeypatch: pytest.MonkeyPatch,
):
    """A trainer that keeps all of its 3 GiB, and empties torch's cache of as many."""
    gib, idle = 2**30, [3]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", idle.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((100 - sum(idle)) * gib, 140 * gib))
    learner: Any = SimpleNamespace(
        held=lambda: {"optimizer": 3 * gib},
        park=lambda part: torch.cuda.empty_cache(),
        unpark=lambda part: None,
    )
    turns = TakeTurns(learner=learner, engine=FakeGenerator(lambda *_: ""), park=("optimizer",))
    world: Any = SimpleNamespace(
        learner=learner,
        engine=turns.engine,
        gpu=SimpleNamespace(turns=turns, syncing=nullcontext),
        sync=lambda version: None,
        requests=lambda *_, **__: [],
        step=lambda *_: {},
    )
    numbers, bounds = cycle.given_back(world)
    assert numbers["learner_kept_gib"] == 3 > bounds["learner_kept_gib"]


def sections(text: str) -> dict[str, list[list[str]]]:
    """Heading -> the cells of its table's rows."""
    found: dict[str, list[list[str]]] = {}
    for part in text.split("\n## ")[1:]:
        rows = [line for line in part.splitlines() if line.startswith("| ")]
        found[part.splitlines()[0]] = [[c.strip() for c in row.split("|")[1:-1]] for row in rows]
    return found


def test_documents_quote_no_figure_of_what_was_not_run():
    """Of each part, the table of benchmarks/README.md says what a committed report says."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = sections(text)["Both engines on a GPU"][1:]
    assert {row[0] for row in rows} == gpu_check.PARTS.keys() - {"kernels"}
    for part, check, said, _ in rows:
        reports = [*(ROOT / "benchmarks").glob(f"*/{part}.json")]
        results = [r for p in reports for r in json.loads(p.read_text())["results"]]
        assert all(not r["numbers"] for r in results if r["status"] == "not_run")
        ran = [r for r in results if r["status"] != "not_run" and check in r["name"]]
        assert ran or said == "not_run", f"{part}, {check}: {said} was never seen"


def test_documents_claim_no_speed_that_no_gpu_has_shown():
    """A ratio to a floor or a rival needs a committed report of a GPU."""
    reports = list((ROOT / "benchmarks").glob("*/kernels.json"))
    for report in reports:
        results = json.loads(report.read_text())["results"]
        assert all(not r["numbers"] for r in results if r["status"] == "not_run")
    if not reports:
        text = (ROOT / "benchmarks" / "README.md").read_text()
        section = text.split("## Kernels on a GPU")[1].split("\n## ")[0]
        assert "not_run" in section
        for document in ("README.md", "docs/design.md", "benchmarks/README.md"):
            claimed = re.findall(r"[\d.]+ ?(?:TFLOP/s|TF/s|TB/s)", (ROOT / document).read_text())
            assert claimed == [], f"{document} claims what no GPU has shown"

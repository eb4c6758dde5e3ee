"""Each way in which the two engines can come apart, or one fail, ends the run within one step."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_srpo.algorithm import collect_groups
from megatron_srpo.assembly import Run, assemble
from megatron_srpo.colocation import Colocation
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.inputs import read_inputs
from megatron_srpo.protocols import Collect, Learner, NamedTensors
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.telemetry import Telemetry
from megatron_srpo.train import loop
from megatron_srpo.types import AlarmError, Batch, Prompt, Score
from megatron_srpo.weight_sync import PROBE_TOKENS
from tests.e2e.small_run import small_config
from tests.unit.builders import in_place


class StaleLearner:
    """Exports the first weights that it ever exported wherever `is_stale(name)`."""

    def __init__(self, learner: Learner, is_stale: Callable[[str], bool]) -> None:
        self.update, self.logprobs, self._export = learner.update, learner.logprobs, learner.export
        self._stale = {n: tensor.clone() for n, tensor in learner.export() if is_stale(n)}

    def export(self) -> NamedTensors:
        for name, tensor in self._export():
            yield name, self._stale.get(name, tensor)


def stale(run: Run, is_stale: Callable[[str], bool]) -> Run:
    learner = StaleLearner(run.learner, is_stale)
    return replace(run, learner=learner, weight_sync=replace(run.weight_sync, learner=learner))


def bias_not_synced(run: Run) -> Run:
    return stale(run, lambda name: name.endswith("q_proj.bias") or name.endswith("v_proj.bias"))


def tied_head_not_synced(run: Run) -> Run:
    return stale(run, lambda name: name == "lm_head.weight")


def prefix_cache_not_reset(run: Run) -> Run:
    run.engine._llm.reset_prefix_cache = lambda: True
    return run


def trainer_temperature_off_by_one_percent(run: Run) -> Run:
    run.learner._temperature *= 1.01  # type: ignore[attr-defined]
    return run


@pytest.fixture
def run(tmp_path: Path, mesh: Mesh, engines: list[object]) -> Run:
    cfg = small_config(tmp_path, "num_steps=1", "algorithm.resets=none")
    torch.manual_seed(0)
    run = assemble(cfg, read_inputs(cfg, num_processes=1), mesh, None, Colocation.on(mesh))
    engines.append(run.engine)
    # A random policy never solves the task; the parity of its length gives it a gradient.
    return replace(run, collect=_rewarded(run))


def _rewarded(run: Run) -> Collect:
    roles = run.collect.keywords["roles"]  # type: ignore[attr-defined]

    def parity(prompt: Prompt, response: str) -> Score:
        return Score(value=float(len(response) % 2), correct=bool(len(response) % 2))

    return partial(collect_groups, roles=replace(roles, judge=in_place(parity)), cfg=run.cfg)


def go(run: Run) -> None:
    folder, watch = RunFolder(run.cfg.run_dir), Stopwatch()
    folder.create(run.cfg)
    with Telemetry(folder, run.cfg.log, name="a run", num_steps=1, stopwatch=watch) as telemetry:
        loop(run, telemetry)


class OperationCount(TorchDispatchMode):
    """How often torch was asked for each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_without_a_fault_the_step_is_green_and_goes_through_the_fused_operations(run: Run) -> None:
    count, update, num_micro_batches = OperationCount(), run.learner.update, 0

    def counted(batches: Sequence[Batch]) -> dict[str, float]:
        nonlocal num_micro_batches
        num_micro_batches += sum(len(batch.micro_batches) for batch in batches)
        with count:
            return update(batches)

    run.learner.update = counted  # type: ignore[method-assign]
    go(run)
    assert num_micro_batches > 0
    for name in ("linear_logprob", "linear_logprob_backward", "policy_loss"):
        assert count.calls[f"megatron_srpo::{name}"] == num_micro_batches


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (bias_not_synced, "after weight sync 1"),
        (tied_head_not_synced, "after weight sync 1"),
        (prefix_cache_not_reset, "after weight sync 1"),
        (trainer_temperature_off_by_one_percent, "step 0: the trainer's log-probs differ"),
    ],
)
def test_a_fault_turns_the_run_red_within_one_step(
    run: Run, fault: Callable[[Run], Run], message: str
) -> None:
    with pytest.raises(AlarmError, match=message) as alarm:
        go(fault(run))
    print(f"\n{fault.__name__}: {alarm.value}")  # pytest -s shows by how much


@pytest.mark.parametrize("phase", ["sync", "generate", "train", "checkpoint"])
def test_exhausted_memory_stops_the_run_with_the_phase_that_needed_it(run: Run, phase: str) -> None:
    def exhausted(*arguments: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And more")

    broken = {
        "sync": lambda: replace(run, weight_sync=exhausted),  # type: ignore[arg-type]
        "generate": lambda: replace(run, collect=exhausted, evaluate=lambda: {}),
        "train": lambda: replace(run, learner=SimpleNamespace(update=exhausted)),  # type: ignore[arg-type]
        "checkpoint": lambda: replace(run, checkpoints=SimpleNamespace(after=exhausted)),  # type: ignore[arg-type]
    }[phase]()
    with pytest.raises(AlarmError, match=f"^out of memory in phase '{phase}'.* to need less: "):
        go(broken)


def hook_the_engine_s_model(run: Run, hook: Callable[..., Any]) -> Run:
    """`hook(number of this pass after the first probe, output)` stands for what the model gives; no
    evaluation."""
    count = itertools.count(-PROBE_TOKENS)

    def install(worker: Any) -> None:
        model = worker.model_runner.get_model()
        model.register_forward_hook(lambda _, __, output: hook(next(count), output))

    run.engine._llm.collective_rpc(install)
    return replace(run, evaluate=lambda: {})


def test_numbers_that_are_none_in_the_engine_stop_the_run_with_step_and_request(run: Run) -> None:
    broken = hook_the_engine_s_model(run, lambda number, x: x * float("nan") if number > 2 else x)
    with pytest.raises(AlarmError, match=r"^step 0, request 0/train\d+/base/\d: log-prob nan of "):
        go(broken)


def test_what_the_engine_raises_keeps_its_traceback_and_names_its_requests(run: Run) -> None:
    def fail(number: int, output: Any) -> Any:
        if number == 3:
            raise MemoryError("no room in the engine")
        return output

    with pytest.raises(MemoryError, match="no room in the engine") as raised:
        go(hook_the_engine_s_model(run, fail))
    at_work, in_step = raised.value.__notes__
    assert re.match(
        r"the rollout engine was at work on step 0, requests (0/train\d+/base/\d, ){4}"
        r"0/train\d+/base/\d and \d+ more",
        at_work,
    )
    assert in_step == "a run: in step 0 of 1, from 0"
    log = RunFolder(run.cfg.run_dir).log.read_text()
    assert log.startswith("stopped in step 0: no room in the engine\nTraceback")
    assert at_work in log and "in fail\n" in log

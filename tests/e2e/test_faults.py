"""Each way in which the two engines can come apart turns the run red within one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

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
from megatron_srpo.types import AlarmError, Prompt, Score
from tests.e2e.small_run import small_config


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

    return partial(collect_groups, roles=replace(roles, reward=parity), cfg=run.cfg)


def go(run: Run) -> None:
    RunFolder(run.cfg.run_dir).create(run.cfg)
    with Telemetry(None, run.cfg.log, name="", num_steps=1, stopwatch=Stopwatch()) as telemetry:
        loop(run, telemetry)


def test_without_a_fault_the_step_is_green(run: Run) -> None:
    go(run)


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

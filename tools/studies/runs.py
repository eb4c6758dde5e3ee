"""A run of the project's own loop that leaves a few numbers and no folder.   run -> record

Processes serve many runs on one mesh each: imports cost more than a run's engines. `train.loop`
is called as it is; what is different is what it is given: a telemetry whose lines stay in memory,
a journal that counts instead of writing, and an evaluation that ends the run when its budget of
generated tokens is spent.
"""

# The environment must be set before torch is imported.
# ruff: noqa: E402
from __future__ import annotations

import functools
import gc
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from megatron_srpo.environment import (
    LAUNCHED,
    be_one_process_unless_launched,
    set_environment,
)

warnings.simplefilter("ignore")
set_environment()

import vllm.model_executor.models.qwen2  # noqa: F401

import megatron_srpo.engines.vllm.cpu_worker  # noqa: F401
from megatron_srpo.assembly import Run, assemble
from megatron_srpo.colocation import Colocation
from megatron_srpo.config_file import load_config
from megatron_srpo.engines.megatron.mesh import Mesh, build_mesh
from megatron_srpo.inputs import read_inputs
from megatron_srpo.metrics import GENERATED, Sums, combine
from megatron_srpo.resets import first_wrong_thought
from megatron_srpo.telemetry import Telemetry
from megatron_srpo.train import loop
from megatron_srpo.types import Group
from tools.studies.regimes import CONFIG, REGIMES, ROOT
from tools.studies.store import Job, Record

MANY_STEPS = 10_000
"""The budget ends a run, the number of its steps never does."""
FIXED = (f"num_steps={MANY_STEPS}", "max_logprob_diff=0.01", "run_dir=runs/claims")
"""Of all runs. The demo's bound on differences is an alarm for its small learning rate; a sharper
policy amplifies fp32 rounding. Nothing is written to `run_dir`."""
PASS = "eval/held_out/pass_at_1"
MISMATCH = "mismatch/logprob_abs_max"
"""Of steps that train on something."""


class BudgetSpent(BaseException):
    """The run has what it came for; no `Exception`, like `StopRequested`."""

    def __init__(self, evaluated: Sums) -> None:
        super().__init__()
        self.evaluated = evaluated


@dataclass(slots=True)
class Workplace:
    """What a process keeps between runs."""

    mesh: Mesh
    engines: list[Any] = field(default_factory=list)
    """vLLM's finalizer would take the mesh's process groups with it."""


@functools.cache
def workplace() -> Workplace:
    """This process's."""
    os.chdir(ROOT)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())
    for name in LAUNCHED:  # of whoever made this process, and listens there itself
        os.environ.pop(name, None)
    be_one_process_unless_launched()
    mesh = build_mesh()
    gc.freeze()  # what imports have made need not be looked at again
    return Workplace(mesh)


class Lines(Telemetry):
    """Keeps what the loop logs."""

    lines: list[dict[str, float]]

    def log(self, step: int, metrics: Mapping[str, float], summary: str) -> None:
        self.lines.append({"step": step, **metrics})

    @property
    def tokens(self) -> float:
        """Generated until now."""
        return sum(line.get(name, 0.0) for line in self.lines for name in GENERATED)


@dataclass(slots=True)
class Counts:
    """What the metrics do not tell of a step's groups."""

    thoughts_delimiter: str
    by_depth: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0] * 4))
    """Thought that a reset went back to -> suffixes from clean prefixes, right ones of them; from
    erroneous prefixes, right ones."""
    fresh: list[tuple[int, int]] = field(default_factory=list)
    """Of each step: base rollouts, trained or not; right ones."""

    def __call__(self, step: int, groups: Sequence[Group]) -> None:
        rollouts = {r.id: r for group in groups for r in group.rollouts}
        drawn = [r for r in rollouts.values() if r.stage == "base"]
        self.fresh.append((len(drawn), sum(r.score.correct for r in drawn)))
        for group in groups:
            for reset in group.resets:
                truth = first_wrong_thought(rollouts[reset.seed_id], self.thoughts_delimiter)
                if reset.thought is None or truth is None:
                    continue
                row, first = self.by_depth[reset.thought], 0 if reset.thought <= truth else 2
                mine = [r.score.correct for r in group.rollouts if r.seed_id == reset.seed_id]
                row[first] += len(mine)
                row[first + 1] += sum(mine)


def do(job: Job) -> Record:
    """The run itself."""
    here, regime = workplace(), REGIMES[job.regime]
    overrides = [*regime.overrides, *FIXED, f"seed={job.seed}", *job.settings]
    cfg = load_config(CONFIG, overrides)
    inputs = read_inputs(cfg, num_processes=1)
    run = assemble(cfg, inputs, here.mesh, None, Colocation.on(here.mesh))
    here.engines.append(run.engine)
    lines = Lines(None, cfg.log, name="", num_steps=MANY_STEPS, stopwatch=run.stopwatch)
    lines.lines = []
    counts = Counts(cfg.thoughts.delimiter)

    def evaluate() -> Sums:
        evaluated = run.evaluate()
        if lines.tokens >= regime.budget:
            raise BudgetSpent(evaluated)
        return evaluated

    run.stopwatch.take()
    try:
        loop(replace(run, record=counts, evaluate=evaluate), lines)
    except BudgetSpent as end:
        lines.log(len(lines.lines), combine([end.evaluated]), "")
    inputs.judge.close()
    return record(job, run, lines.lines, counts)


def record(job: Job, run: Run, lines: Sequence[Mapping[str, float]], counts: Counts) -> Record:
    """Of the loop's metrics what the studies ask for."""
    *steps, _ = lines
    at = [index for index, line in enumerate(lines) if PASS in line]
    spent = [sum(line.get(name, 0.0) for name in GENERATED) for line in lines]
    intervals = [range(a, b) for a, b in pairwise(at)]

    def means(name: str) -> list[float | None]:
        found = [[steps[i][name] for i in each if name in steps[i]] for each in intervals]
        return [round(fmean(values), 3) if values else None for values in found]

    fresh = [
        round(sum(counts.fresh[i][1] for i in each) / sum(counts.fresh[i][0] for i in each), 3)
        for each in intervals
    ]
    total = {
        name: sum(line.get(name, 0.0) for line in steps) for line in steps[:1] for name in line
    }
    return Record(
        job=job,
        step=at,
        tokens=[int(sum(spent[:index])) for index in at],
        passed=[round(lines[index][PASS], 4) for index in at],
        base=means("pass_rate/base"),
        fresh=fresh,
        suffix=means("pass_rate/suffix"),
        exact=means("localize/exact_rate"),
        clean=means("localize/clean_rate"),
        depth={str(thought): row for thought, row in sorted(counts.by_depth.items())},
        kinds={n.removeprefix("tokens/"): int(total.get(n, 0)) for n in GENERATED},
        seconds={
            n.removeprefix("time/").removesuffix("_s"): round(seconds, 1)
            for n, seconds in total.items()
            if n.startswith("time/") and seconds >= 0.05
        },
        length=round(lines[-1]["eval/held_out/response_tokens_mean"], 2),
        mismatch=float(f"{max(line.get(MISMATCH, 0.0) for line in steps):.1e}"),
    )

"""Parts `colocation` and `loop`: does the GPU's memory change hands, and does a whole run work?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_srpo.environment import unlaunched
from megatron_srpo.turns import TakeTurns
from tests.e2e.small_run import write_small_run
from tests.tiny import write_policy
from tools.gpu.apart import ROOT, run_apart
from tools.gpu.result import Numbers, Result, not_run, run_check
from tools.gpu.world import GIB, World, config_of, needed_gib, used_gib

Task = tuple[str, Callable[[], list[Result]]]
VARIANTS = {
    "bf16": ["dtype=bfloat16"],
    "bf16, weights lent too": [
        "dtype=bfloat16",
        "colocation.park=[optimizer,gradients,weights]",
    ],
    "FP8 rollouts": ["dtype=bfloat16", "fp8.rollout=true"],
}
WIDE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64}
"""So that what is given back is larger than what the driver rounds."""
PROBE_NATS = {"float32": 1e-4, "bf16": 0.5, "bf16, weights lent too": 0.5, "FP8 rollouts": 1.0}
NUM_CYCLES = 3
WORKING = ("generate", "localize", "suffix", "eval", "train", "sync", "reward")


def colocation_tasks(device: torch.device, deadline: float) -> Iterator[Task]:
    if device.type == "cpu":
        target, given = "tools.gpu.cycle:cycles", {"name": "float32", "overrides": []}
        yield "float32", partial(run_apart, "float32", target, given, deadline)
    for name, overrides in VARIANTS.items():
        if device.type == "cpu":
            yield name, lambda name=name: [not_run(name, "no GPU")]
            continue
        target, given = "tools.gpu.cycle:cycles", {"name": name, "overrides": overrides}
        yield name, partial(run_apart, name, target, given, deadline)


def cycles(name: str, overrides: list[str]) -> list[Result]:
    """Sync, generate, train, several times: the probe, and where there is a GPU its memory."""
    is_gpu = torch.cuda.is_available()
    shape = WIDE if is_gpu else {}
    folder = write_policy(Path(tempfile.mkdtemp()), seed=0, num_layers=4, tied=False, **shape)
    bound = PROBE_NATS[name]
    world = World.build(config_of(folder, f"max_logprob_diff={bound}", *overrides))
    probes: list[float] = []
    for version in range(NUM_CYCLES):
        requests = world.requests(8, prompt=32, response=24, step=version)
        found = world.step(requests, version)
        probes.append(found["sync/probe_logprob_abs_max"])
    results = [
        run_check(f"{name}: probe", lambda: ({"nats": max(probes)}, {"nats": bound})),
    ]
    memory = f"{name}: memory"
    if not is_gpu:
        return [*results, not_run(memory, "no GPU")]
    return [*results, run_check(memory, partial(given_back, world))]


def given_back(world: World) -> tuple[Numbers, Numbers]:
    """What the driver has again when the engine sleeps, and when the trainer has lent, of their own
    and not of what lay idle in torch's allocator; and what three more cycles have taken for good.
    """
    turns = world.gpu.turns
    assert isinstance(turns, TakeTurns)
    learner, before = world.learner.held(), needed_gib()
    for part in turns.park:
        world.learner.park(part)
    lent = before - used_gib()
    for part in turns.park:
        world.learner.unpark(part)
    with world.gpu.syncing():
        world.sync(version=NUM_CYCLES)
    engine, before = world.engine.held(), needed_gib()
    turns.train()
    # Training has its own back; what is left of the difference is the engine's.
    freed = before - used_gib() + lent
    start = needed_gib()
    for version in range(NUM_CYCLES):
        requests = world.requests(8, prompt=32, response=24, step=version)
        world.step(requests, NUM_CYCLES + 1 + version)
    expected = sum(learner[part] for part in turns.park) / GIB
    numbers = {
        "learner_kept_gib": expected - lent,
        "engine_kept_gib": sum(engine.values()) / GIB - freed,
        "grown_gib": needed_gib() - start,
    }
    return numbers, {"learner_kept_gib": 0.1, "engine_kept_gib": 0.1, "grown_gib": 0.1}


def loop_tasks(device: torch.device, deadline: float) -> Iterator[Task]:
    yield "a run of three steps", partial(loop, device.type, deadline)


def loop(kind: str, deadline: float) -> list[Result]:
    """By the real command."""
    name, folder = "a run of three steps", Path(tempfile.mkdtemp())
    coarse = ["dtype=bfloat16", "max_logprob_diff=0.5"] if kind == "cuda" else []
    command = [sys.executable, "-m", "megatron_srpo", "train", str(write_small_run(folder))]
    left = None if deadline == float("inf") else max(1.0, deadline - time.monotonic())
    try:
        done = subprocess.run(
            [*command, "num_steps=3", *coarse], cwd=ROOT, capture_output=True, text=True,
            env=unlaunched() | {"PYTHONPATH": str(ROOT)}, timeout=left, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [not_run(name, f"not done in {left:.0f} s")]

    def check() -> tuple[Numbers, Numbers]:
        assert done.returncode == 0, (done.stderr.strip().splitlines() or ["silent"])[-1]
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 4, f"{len(rows)} lines of metrics"
        return of_last_step(rows[2]), {}

    return [run_check(name, check)]


def of_last_step(row: dict[str, float]) -> Numbers:
    """The first ones compile."""
    kept = ("time/", "memory/", "speed/", "sync/", "mismatch/")
    return {name: value for name, value in row.items() if name.startswith(kept)}


def overhead(row: dict[str, float]) -> float:
    """Share of a step that is neither generation, training, sync nor reward."""
    worked = sum(row.get(f"time/{phase}_s", 0.0) for phase in WORKING)
    return 1 - worked / row["time/step_s"]

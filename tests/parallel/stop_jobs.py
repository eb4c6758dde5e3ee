"""What a rank does that is asked to stop in an update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_srpo.batching import mini_batches
from megatron_srpo.colocation import Colocation
from megatron_srpo.config_sections import OptimizerConfig
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.stopping import Point, StopPoints, StopRequested
from tests.parallel.jobs import PPO, TEMPERATURE, Tensors, exported, shared
from tests.tiny import random_samples

FAR = Point(10**6, 0)


def stopped(mesh: Mesh, policy: Path) -> dict[str, Any]:
    """An update of two batches, begun anew after it was stopped at several micro-batches, and the
    same by a learner that nobody stops.

    Points are, in this order: both batches under the reference, the second under the old policy,
    and the first with gradients.
    """
    points = Colocation.on(mesh).points
    learner, calm = build(policy, mesh, points), build(policy, mesh, StopPoints())
    samples = [replace(s, turn=i % 2) for i, s in enumerate(random_samples(10, seed=4))]
    batches = [shared(turn, mesh, max_tokens=30) for turn in mini_batches(samples, 2)]
    first, second = (len(batch.micro_batches) for batch in batches)
    assert first > 1
    stops = [0, 1, first + second, first + 2 * second, first + 2 * second + 1]
    found: dict[str, Any] = {"asked": stops, "passed": []}
    before = exported(learner)
    for index in stops:
        ask(points, Point(points._section + 1, index))
        try:
            learner.update(batches)
        except StopRequested:
            found["passed"].append(points.num_passed)
    found["untouched"] = equal(before, exported(learner))
    ask(points, FAR)
    found["same"] = learner.update(batches) == calm.update(batches)
    found["same"] &= equal(exported(learner), exported(calm))
    return found


def build(policy: Path, mesh: Mesh, points: StopPoints) -> MegatronLearner:
    return MegatronLearner(
        policy,
        mesh,
        dtype=torch.float32,
        temperature=TEMPERATURE,
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4, warmup_steps=3),
        loss=PPO,
        num_steps=10,
        points=points,
    )


def ask(points: StopPoints, point: Point) -> None:
    points.agree(lambda position: {points.replica: point})


def equal(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

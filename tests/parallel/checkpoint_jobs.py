"""Jobs that save a learner and load it, on layouts of all sorts."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_srpo.config_sections import OptimizerConfig
from megatron_srpo.engines.megatron.checkpoint import CheckpointWriter, load_checkpoint
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.types import AlarmError, InputError
from tests.parallel.jobs import REINFORCE, TEMPERATURE, Tensors, shared
from tests.tiny import random_samples

BEFORE, AFTER = range(2), range(2, 5)
"""Steps before the checkpoint, and after it."""
Trained = tuple[list[dict[str, float]], Tensors]


def build(mesh: Mesh, policy: Path, dtype: torch.dtype = torch.float32) -> MegatronLearner:
    """With weight decay, warm-up and decay: whatever a step could forget shows."""
    return MegatronLearner(
        policy,
        mesh,
        dtype=dtype,
        temperature=TEMPERATURE,
        optimizer=OptimizerConfig(
            lr=1e-2, eps=1e-4, clip_grad=0.05, weight_decay=0.1, warmup_steps=3, decay="linear"
        ),
        loss=REINFORCE,
        num_steps=6,
    )


def go_on(learner: MegatronLearner, mesh: Mesh, steps: Sequence[int]) -> Trained:
    """(metrics of the steps, the weights after them)"""
    stats = [learner.update([shared(random_samples(5, seed=step), mesh)]) for step in steps]
    return stats, {name: tensor.clone() for name, tensor in learner.export()}


def save(learner: MegatronLearner, mesh: Mesh, folder: Path) -> CheckpointWriter:
    """Begins, asynchronously."""
    if mesh.rank == 0:
        folder.mkdir()
    mesh.gather(None)
    writer = CheckpointWriter(learner, asynchronous=True, gather=mesh.gather)
    writer.begin(folder)
    return writer


def uninterrupted(
    mesh: Mesh, policy: Path, folder: Path, dtype: torch.dtype = torch.float32
) -> Trained:
    """Trains on while the checkpoint is being written."""
    learner = build(mesh, policy, dtype)
    go_on(learner, mesh, BEFORE)
    writer = save(learner, mesh, folder)
    found = go_on(learner, mesh, AFTER)
    assert writer.is_done(wait=True)
    return found


def resumed(mesh: Mesh, policy: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Trained:
    learner = build(mesh, policy, dtype)
    load_checkpoint(learner, folder)
    return go_on(learner, mesh, AFTER)


def saved_at_once(mesh: Mesh, policy: Path, folder: Path) -> Trained:
    """Before any update."""
    learner = build(mesh, policy)
    writer = save(learner, mesh, folder)
    found = go_on(learner, mesh, AFTER)
    assert writer.is_done(wait=True)
    return found


def lost_while_writing(mesh: Mesh, policy: Path, folder: Path) -> str:
    """The alarm, on every rank."""
    learner = build(mesh, policy)
    with mock.patch.object(filesystem_async, "_write_item", no_room):
        writer = save(learner, mesh, folder)
        try:
            writer.is_done(wait=True)
        except AlarmError as alarm:
            return str(alarm)
    return "no alarm"


def no_room(*arguments: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(mesh: Mesh, policy: Path, folders: Sequence[Path]) -> list[str]:
    """What is said to the loading of each, on this rank."""
    learner, said = build(mesh, policy), []
    for folder in folders:
        try:
            load_checkpoint(learner, folder)
            said.append("loaded")
        except InputError as error:
            said.append(str(error))
    return said

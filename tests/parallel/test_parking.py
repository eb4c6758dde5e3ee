"""A learner whose memory is away and comes back is the learner that it was.

The device is the CPU here: what is parked is copied to other memory, and its storage is emptied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_srpo.config_sections import LossConfig, OptimizerConfig
from megatron_srpo.engines.megatron import parking
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.reference import ParkedWeights
from megatron_srpo.protocols import LearnerPart
from megatron_srpo.types import InputError
from tests.parallel.jobs import shared
from tests.tiny import random_samples

PARTS: tuple[LearnerPart, ...] = ("optimizer", "gradients", "weights")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that storages cross from one piece of host memory to the next."""
    monkeypatch.setattr(parking, "PIECE", 4099)


def build(policy: Path, mesh: Mesh, dtype: torch.dtype) -> MegatronLearner:
    return MegatronLearner(
        policy,
        mesh,
        dtype=dtype,
        temperature=0.8,
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4),
        loss=LossConfig(),
        num_steps=10,
    )


def update(learner: MegatronLearner, mesh: Mesh, step: int) -> dict[str, float]:
    return learner.update([shared(random_samples(4, seed=step), mesh)])


def addresses(learner: MegatronLearner) -> list[tuple[Any, ...]]:
    """Of every parameter, its gradient and its float32 copy: which storage, and where in it."""
    views: list[torch.Tensor] = []
    for module in learner.modules:
        for parameter in module.parameters():
            known: Any = parameter
            views += [parameter, known.main_grad]
    views += [*learner.optimizer.tensors()]
    return [(id(v), v.untyped_storage()._cdata, v.storage_offset(), v.shape) for v in views]


def exported(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.export()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parked_and_back_every_view_is_the_same_and_the_next_update_bit_equal(
    policy: Path, mesh: Mesh, dtype: torch.dtype
):
    left_alone, lending = (build(policy, mesh, dtype) for _ in range(2))
    for step in range(3):
        assert update(left_alone, mesh, step) == update(lending, mesh, step)
        whole, where, held = exported(lending), addresses(lending), lending.held()
        optimizer = [tensor.clone() for tensor in lending.optimizer.tensors()]
        for part in PARTS:
            lending.park(part)
        assert lending.held() == dict.fromkeys(held, 0), "their storages are empty"
        assert all(held.values())
        for part in reversed(PARTS):
            lending.unpark(part)
        assert lending.held() == held
        assert addresses(lending) == where
        pairs = zip(optimizer, lending.optimizer.tensors(), strict=True)
        assert all(torch.equal(before, after) for before, after in pairs)
        for one in (left_alone, lending):
            again = exported(one)
            assert all(torch.equal(whole[name], tensor) for name, tensor in again.items())


def test_a_trainer_that_has_lent_all_but_its_weights_can_judge_and_export(policy: Path, mesh: Mesh):
    learner = build(policy, mesh, torch.float32)
    update(learner, mesh, 0)
    sequences = [sample.token_ids for sample in random_samples(3, seed=5)]
    before = learner.logprobs(sequences, temperature=0.8), exported(learner)
    for part in ("optimizer", "gradients"):
        learner.park(part)
    after = learner.logprobs(sequences, temperature=0.8), exported(learner)
    assert all((a == b).all() for a, b in zip(before[0], after[0], strict=True))
    assert all(torch.equal(before[1][name], tensor) for name, tensor in after[1].items())


def test_what_a_learner_holds_is_counted_by_owner(policy: Path, mesh: Mesh):
    """bfloat16: 2 bytes a weight, 4 a gradient, 12 of Adam's and its float32 copy (and a step of 4
    bytes a parameter, torch's own, on this device too)."""
    learner = build(policy, mesh, torch.bfloat16)
    update(learner, mesh, 0)
    parameters = [p for module in learner.modules for p in module.parameters()]
    count = sum(p.numel() for p in parameters)
    held = learner.held()
    assert held["optimizer"] == 12 * count + 4 * len(parameters)
    assert count <= held["weights"] / 2 <= count + 64 * len(parameters) + 128, "and its padding"
    assert held["gradients"] == 2 * held["weights"]


def test_the_initial_policy_waits_in_the_same_pieces(policy: Path, mesh: Mesh):
    """Pinned one by one, each parameter would take the next power of two: up to twice as much."""
    modules = build(policy, mesh, torch.bfloat16).modules
    waiting = ParkedWeights(modules)
    count = sum(p.numel() for module in modules for p in module.parameters())
    sizes = [len(piece) for piece in waiting._host.pieces]
    assert sum(sizes) == 2 * count and {*sizes[:-1]} == {4099}


def test_an_offload_that_would_be_ignored_is_refused(policy: Path, mesh: Mesh):
    with pytest.raises(InputError, match=r"offload_fraction=0\.5 needs a GPU"):
        MegatronLearner(
            policy,
            mesh,
            dtype=torch.bfloat16,
            temperature=0.8,
            optimizer=OptimizerConfig(offload_fraction=0.5),
            loss=LossConfig(),
            num_steps=10,
        )

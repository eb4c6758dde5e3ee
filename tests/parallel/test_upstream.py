"""Faults of Megatron-Core that `engines/megatron/upstream.py` goes around.

The tests named `upstream_still_...` fail when upstream has mended a fault: then its way around
goes, and its line in upstream.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_srpo.engines.megatron.layers import RMSNorm
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.upstream import (
    allocate_hybrid,
    allocate_states,
    load_states,
    sharded_states,
)
from tests.parallel.checkpoint_jobs import build, go_on


def optimizer_of(learner: MegatronLearner) -> Any:
    return learner.optimizer._optimizer


def arguments_of(learner: MegatronLearner) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Megatron's optimizer asks for: the model's state, and how to save its own."""
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
    }
    return {"model": learner.modules[0].sharded_state_dict(metadata=metadata)}, metadata


def state_of(learner: MegatronLearner, *, is_loading: bool) -> dict[str, Any]:
    """By Megatron alone."""
    model, metadata = arguments_of(learner)
    return optimizer_of(learner).sharded_state_dict(model, is_loading=is_loading, metadata=metadata)


def as_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """As it would come out of a checkpoint."""

    def plain(value: Any) -> Any:
        is_tensor = isinstance(value, ShardedTensor | ShardedTensorFactory)
        return value.data.clone() if is_tensor else value

    return dict_list_map_outplace(plain, state)


def saved(learner: MegatronLearner) -> dict[str, Any]:
    """As it would come out of a checkpoint of ours."""
    return as_loaded(
        sharded_states(optimizer_of(learner), *arguments_of(learner), is_loading=False)
    )


def steps_of(learner: MegatronLearner) -> list[torch.Tensor]:
    return [state["step"] for state in optimizer_of(learner).optimizer.state.values()]


@pytest.fixture
def stepped(policy: Path, mesh: Mesh) -> MegatronLearner:
    learner = build(mesh, policy)
    go_on(learner, mesh, range(2))
    return learner


def test_upstream_still_cannot_speak_of_an_optimizer_without_a_step(
    policy: Path, mesh: Mesh
) -> None:
    with pytest.raises(AssertionError):
        state_of(build(mesh, policy), is_loading=True)


def test_allocated_states_are_those_with_which_a_first_step_begins(
    policy: Path, mesh: Mesh
) -> None:
    fresh, allocated = build(mesh, policy), build(mesh, policy)
    allocate_states(optimizer_of(allocated))
    assert {float(step) for step in steps_of(allocated)} == {0.0}
    state_of(allocated, is_loading=False)
    (stats, weights), (also, same) = (go_on(one, mesh, range(2)) for one in (fresh, allocated))
    assert stats == also
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_upstream_still_does_not_find_torch_s_step_in_a_checkpoint(
    stepped: MegatronLearner,
) -> None:
    loaded = as_loaded(state_of(stepped, is_loading=False))
    with pytest.raises(KeyError, match="step"):
        optimizer_of(stepped).load_state_dict(loaded)


def test_upstream_still_gives_all_parameters_one_step_tensor(
    policy: Path, mesh: Mesh, stepped: MegatronLearner
) -> None:
    learner = build(mesh, policy)
    allocate_states(optimizer_of(learner))
    state = as_loaded(state_of(stepped, is_loading=False))
    del state["param_state"]
    optimizer_of(learner).load_state_dict(state)
    assert len({step.data_ptr() for step in steps_of(learner)}) == 1
    go_on(learner, mesh, range(1))
    assert float(steps_of(learner)[0]) == 2 + len(steps_of(learner)), "one step counts once each"


def test_loaded_states_have_a_step_each_and_go_on_as_the_saved_ones(
    policy: Path, mesh: Mesh, stepped: MegatronLearner
) -> None:
    learner = build(mesh, policy)
    allocate_states(optimizer_of(learner))
    state, schedule = saved(stepped), stepped.optimizer.schedule_state()
    learner.modules[0].load_state_dict(stepped.modules[0].state_dict())
    learner.optimizer.load(state, schedule)
    assert [float(step) for step in steps_of(learner)] == [2.0] * len(steps_of(stepped))
    assert len({step.data_ptr() for step in steps_of(learner)}) == len(steps_of(stepped))
    (stats, weights), (also, same) = (go_on(one, mesh, range(2, 5)) for one in (stepped, learner))
    assert stats == also
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_what_is_loaded_into_a_learner_that_has_stepped_is_what_was_saved(
    policy: Path, mesh: Mesh, stepped: MegatronLearner
) -> None:
    state = saved(stepped)
    learner = build(mesh, policy)
    go_on(learner, mesh, range(7, 10))
    load_states(optimizer_of(learner), state)
    assert {float(step) for step in steps_of(learner)} == {2.0}
    (mine, right) = (optimizer_of(one).optimizer.state.values() for one in (learner, stepped))
    for one, other in zip(mine, right, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("exp_avg", "exp_avg_sq"))


def test_upstream_still_mixes_up_states_where_a_group_has_two_dtypes(
    policy: Path, mesh: Mesh
) -> None:
    """Without the one dtype that `layers.RMSNorm` keeps, norms are float32 among bfloat16."""
    in_policy_dtype = RMSNorm.__init__

    def in_float32(norm: RMSNorm, *arguments: Any, **others: Any) -> None:
        in_policy_dtype(norm, *arguments, **others)
        norm.float()

    with mock.patch.object(RMSNorm, "__init__", in_float32):
        learner = build(mesh, policy, torch.bfloat16)
    (part,) = optimizer_of(learner).chained_optimizers
    wrong = [
        parameter
        for parameter, (group, index) in part.model_param_group_index_map.items()
        if part.optimizer.param_groups[group]["params"][index].numel() != parameter.numel()
    ]
    assert wrong
    with pytest.raises(AssertionError, match="mixed dtypes"):
        allocate_states(optimizer_of(learner))


class Halves:
    """In place of Megatron's HybridDeviceOptimizer, which needs a GPU: two Adams over parameters of
    its own, whose states it shares."""

    def __init__(self) -> None:
        self.parameters = [torch.ones(n, requires_grad=True) for n in (3, 5)]
        self.sub_optimizers = [torch.optim.AdamW([p], lr=0.1) for p in self.parameters]
        self.state: dict[Any, Any] = {}

    def _sync_sub_optimizers_state_to_hdo(self) -> None:
        self.state = {p: s for adam in self.sub_optimizers for p, s in adam.state.items()}


def test_an_optimizer_in_two_places_begins_as_its_first_step_would():
    prepared, plain = Halves(), Halves()
    allocate_hybrid(prepared)
    assert all(
        {name: float(value.abs().sum()) for name, value in state.items()}
        == {"exp_avg": 0, "exp_avg_sq": 0, "step": 0}
        for state in prepared.state.values()
    )
    assert len(prepared.state) == 2
    for halves in (prepared, plain):
        for parameter, adam in zip(halves.parameters, halves.sub_optimizers, strict=True):
            parameter.grad = torch.arange(len(parameter), dtype=torch.float32)
            adam.step()
    pairs = zip(prepared.parameters, plain.parameters, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    allocate_hybrid(prepared)
    assert all(float(state["step"]) == 1 for state in prepared.state.values()), "left alone"

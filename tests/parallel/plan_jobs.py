"""What the processes of the pool hold, by torch's own accounting, for tests of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_srpo.config_sections import LossConfig, OptimizerConfig
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.logprobs import HEADS
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.upstream import allocate_states, parts_of
from megatron_srpo.kernels import linear_logprob, rows
from tests.unit.live_bytes import LiveBytes

Held = tuple[int, int, int, int]
"""Stage; bytes of weights, gradients and optimizer state on this rank."""


def held_bytes(mesh: Mesh, policies: list[Path], dtypes: list[torch.dtype]) -> list[list[Held]]:
    """Of a real learner of each policy in each dtype."""
    return [[_held(mesh, policy, dtype) for dtype in dtypes] for policy in policies]


def _held(mesh: Mesh, policy: Path, dtype: torch.dtype) -> Held:
    learner = MegatronLearner(
        policy,
        mesh,
        dtype=dtype,
        temperature=1.0,
        optimizer=OptimizerConfig(),
        loss=LossConfig(),
        num_steps=1,
    )
    inner: Any = learner.optimizer._optimizer
    allocate_states(inner)
    buffers = [b for model in learner.models for b in model.buffers + model.expert_parallel_buffers]
    weights = {p.untyped_storage().data_ptr() for m in learner.modules for p in m.parameters()}
    assert weights == {b.param_data.untyped_storage().data_ptr() for b in buffers}
    states = [
        tensor
        for part in parts_of(inner)
        for state in part.optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    if dtype != torch.float32:  # else the masters are the weights themselves
        groups = [g for part in parts_of(inner) for g in part.shard_fp32_from_float16_groups]
        states += [master for group in groups for master in group]
    return (
        mesh.pp_rank,
        sum(b.param_data.nbytes for b in buffers),
        sum(b.grad_data.nbytes for b in buffers),
        sum(tensor.nbytes for tensor in states),
    )


def parameter_counts(mesh: Mesh, folders: list[Path]) -> list[tuple[int, int, int]]:
    """Stage, dense and experts' parameters of Megatron's own model on the meta device."""
    found: list[tuple[int, int, int]] = []
    for folder in folders:
        with torch.device("meta"):
            chunks = build_chunks(folder, mesh, torch.bfloat16)
        parameters: list[Any] = [p for chunk in chunks for p in chunk.parameters()]
        dense = sum(p.numel() for p in parameters if getattr(p, "allreduce", True))
        found.append((mesh.pp_rank, dense, sum(p.numel() for p in parameters) - dense))
    return found


def head_bytes(mesh: Mesh, num: int, hidden: int, columns: int) -> dict[str, int]:
    """What each head has allocated at its fullest moment, in fp32, all tokens wanted."""
    states_TH, weight_VH = torch.randn(num, hidden), torch.randn(columns, hidden)
    ids_T, temperature_T = torch.arange(num), torch.ones(num)
    wanted_T, main_grad_VH = torch.ones(num, dtype=torch.bool), torch.zeros(columns, hidden)
    known = states_TH, weight_VH, ids_T, temperature_T, wanted_T, main_grad_VH
    with LiveBytes(*known) as reference:
        gathered_TH = states_TH.clone().requires_grad_()
        logprobs_T, _ = HEADS["reference"](
            gathered_TH,
            weight_VH.requires_grad_(),
            ids_T,
            wanted_T,
            temperature=1.0,
            num_real=columns,
            group=mesh.tp_group,
        )
        logprobs_T.sum().backward()
    forward: Any = linear_logprob._linear_logprob
    backward: Any = linear_logprob._backward
    with LiveBytes(*known) as fused, torch.no_grad():
        chosen_TH = (gathered_TH := states_TH.clone()).index_select(0, ids_T)
        *_, softmax_3T = forward._init_fn(
            chosen_TH, weight_VH, ids_T, temperature_T, 0, columns, rows.name_of(mesh.tp_group),
            linear_logprob.CHUNK, main_grad_VH,
        )  # fmt: skip
        backward._init_fn(
            chosen_TH, weight_VH, ids_T, temperature_T, softmax_3T, torch.ones(2, num), 0, columns,
            linear_logprob.CHUNK, main_grad_VH,
        )  # fmt: skip
    return {"reference": reference.most, "fused": fused.most}

"""Which processes hold what? Process groups as one frozen value.

Two views of the same ranks. The trainer's: tensor x context x data x pipeline parallel, in
Megatron's order (rank = tp + TP (cp + CP (dp + DP pp))); experts are shared by EP consecutive
ranks of a stage. The rollout engines': replicas of consecutive ranks, each one
engine.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.engines.megatron import cpu
from megatron_srpo.rendezvous import meet

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=2)
"""In a collective: rollout engines may be done at different times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Built once by `build_mesh`, passed to whoever talks to other ranks."""

    parallel: ParallelConfig
    """What it was built from."""
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    """Stage of the pipeline."""
    pp_size: int
    pp_group: dist.ProcessGroup
    cp_rank: int
    """Which part of each sequence this rank holds."""
    cp_size: int
    cp_group: dist.ProcessGroup
    ep_rank: int
    """Which experts this rank holds."""
    ep_size: int
    ep_group: dist.ProcessGroup
    dp_rank: int
    """Slot: which copy of the policy this rank holds a part of."""
    dp_size: int
    dp_group: dist.ProcessGroup
    slots: tuple[int, ...]
    """Every rank's `dp_rank`."""
    replica: int
    """Which rollout engine this rank holds a part of."""
    num_replicas: int
    replica_group: dist.ProcessGroup
    """The ranks of one rollout engine, for objects in host memory (gloo)."""
    host_group: dist.ProcessGroup
    """All ranks, for objects in host memory (gloo)."""
    store: Store
    """For what must not wait for all ranks."""

    @property
    def is_leader(self) -> bool:
        """The first rank of its replica: what it says counts for the others."""
        return self.rank % (self.world_size // self.num_replicas) == 0

    @property
    def is_last_stage(self) -> bool:
        """Here logits and losses are."""
        return self.pp_rank == self.pp_size - 1

    @property
    def speaks_for_slot(self) -> bool:
        """One rank of each copy of the policy: what all its last stage's ranks know counts once."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def share(self, value: T) -> T:
        """The leader's value, on every rank of its replica."""
        box = [value]
        if self.num_replicas < self.world_size:
            dist.broadcast_object_list(box, group=self.replica_group, group_src=0)
        return box[0]

    def exchange(self, outgoing: Sequence[T]) -> list[T]:
        """`outgoing[r]` goes to rank r; returns what each rank had for this one."""
        sent = [b"" if r == self.rank else pickle.dumps(x) for r, x in enumerate(outgoing)]
        sizes = self.gather([len(content) for content in sent])
        incoming_sizes = [row[self.rank] for row in sizes]
        incoming = torch.empty(sum(incoming_sizes), dtype=torch.uint8)
        dist.all_to_all_single(
            incoming,
            torch.from_numpy(np.frombuffer(b"".join(sent), dtype=np.uint8).copy()),
            output_split_sizes=incoming_sizes,
            input_split_sizes=sizes[self.rank],
            group=self.host_group,
        )
        parts = [part.numpy().tobytes() for part in incoming.split(incoming_sizes)]
        return [
            outgoing[self.rank] if r == self.rank else pickle.loads(part)
            for r, part in enumerate(parts)
        ]


def build_mesh(
    parallel: ParallelConfig | None = None,
    *,
    rollout_tp: int = 1,
    store: Store | None = None,
    longest_wait: timedelta = LONGEST_WAIT,
) -> Mesh:
    """Collective over all processes, which torchrun or srun has started.

    `inputs.check_layout` has found the sizes to divide; by default all ranks are data parallel.
    `store` is where they have met already, `longest_wait` the time limit of collectives.
    """
    parallel, store = parallel or ParallelConfig(), store or meet()
    _join(store, parallel, longest_wait)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    replicas = np.arange(world_size).reshape(-1, rollout_tp).tolist()
    replica_group, _ = dist.new_subgroups_by_enumeration(
        replicas, timeout=longest_wait, backend="gloo"
    )
    tp_group = _known(parallel_state.get_tensor_model_parallel_group())
    pp_group = _known(parallel_state.get_pipeline_model_parallel_group())
    cp_group = _known(parallel_state.get_context_parallel_group())
    ep_group = _known(parallel_state.get_expert_model_parallel_group())
    dp_group = _known(parallel_state.get_data_parallel_group())
    in_slot = parallel.tp * parallel.cp
    return Mesh(
        parallel=parallel,
        rank=rank,
        world_size=world_size,
        tp_rank=tp_group.rank(),
        tp_size=tp_group.size(),
        tp_group=tp_group,
        pp_rank=pp_group.rank(),
        pp_size=pp_group.size(),
        pp_group=pp_group,
        cp_rank=cp_group.rank(),
        cp_size=cp_group.size(),
        cp_group=cp_group,
        ep_rank=ep_group.rank(),
        ep_size=ep_group.size(),
        ep_group=ep_group,
        dp_rank=dp_group.rank(),
        dp_size=dp_group.size(),
        dp_group=dp_group,
        slots=tuple(r // in_slot % dp_group.size() for r in range(world_size)),
        replica=rank // rollout_tp,
        num_replicas=len(replicas),
        replica_group=_known(replica_group),
        host_group=_known(dist.new_group(backend="gloo", timeout=longest_wait)),
        store=store,
    )


def _join(store: Store, parallel: ParallelConfig, longest_wait: timedelta) -> None:
    """torch's default group, and Megatron's."""
    cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore("groups", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=longest_wait,
    )
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        # Whole experts where several ranks share them: gloo cannot gather what unequal numbers of
        # tokens make of parts of one. Not where none are shared: the gradients of whole experts
        # would then not be added up over tensor parallel ranks (0.16.1; wrong, without an error).
        expert_tensor_parallel_size=1 if parallel.ep > 1 else parallel.tp,
        create_gloo_process_groups=False,
    )
    # Megatron wants its random tracker seeded even where no dropout draws from it.
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def _known(group: Any) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), "this rank is in none of the groups"
    return group


def destroy_mesh() -> None:
    """The rollout engine, when it closes, may have taken the default group with it."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()

"""Which processes hold what: process groups as one frozen value.

So far the mesh is data parallel only; the other axes have length 1.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_srpo.engines.megatron import cpu

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Built once by `build_mesh`, passed to whoever talks to other ranks."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    """All ranks, for objects in host memory (gloo)."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values  # type: ignore[return-value]

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


def build_mesh() -> Mesh:
    """Collective over all processes, which torchrun or srun has started."""
    cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    # Megatron wants its random tracker seeded even where no dropout draws from it.
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    host_group = dist.new_group(backend="gloo")
    dp_group = parallel_state.get_data_parallel_group()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(host_group, dist.ProcessGroup)
    assert isinstance(dp_group, dist.ProcessGroup)
    assert isinstance(tp_group, dist.ProcessGroup)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=dp_group,
        tp_group=tp_group,
        host_group=host_group,
    )


def destroy_mesh() -> None:
    """The rollout engine, when it closes, may have taken the default group with it."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()

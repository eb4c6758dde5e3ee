"""Which shared memory do the processes of a CPU engine meet in? One that no other run has named.

Under `external_launcher` vLLM 0.32 names it after the group's ranks alone: two runs on a machine
ask for the same names, and what a killed run left behind fails the next one ("create shm in
SHMManager failed. errno: 17").
"""

from __future__ import annotations

import uuid

import torch.distributed as dist
from vllm.v1.worker.cpu_worker import CPUWorker


class OwnMemoryWorker(CPUWorker):
    """vLLM's worker; all ranks of a run build theirs together."""

    def init_device(self) -> None:
        """The init method lends shared memory its name and has no other use: the processes have
        met already."""
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        self.distributed_init_method = f"file://{name[0]}"
        super().init_device()

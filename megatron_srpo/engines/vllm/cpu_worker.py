"""What does a CPU engine do otherwise than vLLM's own worker? Its memory's name, and its experts.

- Under `external_launcher` vLLM names the processes' shared memory after the group's ranks alone:
  two runs on a machine ask for the same names, and what a killed run left behind fails the next one
  ("create shm in SHMManager failed. errno: 17"). Under a name of its own a killed run would leave
  its memory taken for ever: the name goes when all have opened it.
- Experts are packed for the CPU when they are loaded first, and no more when they are loaded again
  (0.32's unquantized_fused_moe_method.py: a kernel that exists is kept for the sake of CUDA graphs;
  0.26 has none on CPUs and packs always): after a weight sync their outputs are wrong, without an
  error.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.v1.worker.cpu_worker import CPUWorker

SHARED_MEMORY = Path("/dev/shm")


class CPUEngineWorker(CPUWorker):
    """vLLM's worker; all ranks of a run build theirs together."""

    def init_device(self) -> None:
        """The init method lends shared memory its name and has no other use: the processes have
        met already."""
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        self.distributed_init_method = name[0]
        super().init_device()
        dist.barrier()
        # All have it open: without a name it ends with them, also if they are killed.
        for file in SHARED_MEMORY.glob(f"{name[0]}-*"):
            file.unlink(missing_ok=True)

    def reload_weights(self, *arguments: Any, **others: Any) -> None:
        """Experts get a new kernel, and so are packed again."""
        for module in self.model_runner.get_model().modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None
        super().reload_weights(*arguments, **others)

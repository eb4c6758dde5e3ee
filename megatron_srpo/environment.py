"""The process environment that the libraries read when they are imported: one place, call it first.

Nothing here changes what an algorithm computes.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each of its processes."""


def set_environment() -> None:
    """Before torch, Megatron or vLLM is imported. What the user has set stays as it is."""
    wanted = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the trainer's process
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "SYMPY_GROUND_TYPES": "python",  # no alarm ends what gmpy2 computes for a grader
    }
    if _has_cpu_engine():
        # Compiling costs more than it saves on models that a CPU can train.
        wanted |= {"VLLM_CPU_CI_ENV": "1", "TORCH_COMPILE_DISABLE": "1"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def be_one_process_unless_launched() -> None:
    """Under torchrun or srun the rendezvous is theirs; started plainly, a process is alone."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def unlaunched() -> dict[str, str]:
    """This process's environment as if no launcher had started it."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHED}


def _has_cpu_engine() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

"""Tells Megatron-Core 0.16.1 where CUDA is not. The only file that patches anything.

`install()` does nothing when CUDA is there. Each patched site of 0.16.1, and why:

- `device=torch.cuda.current_device()` (rotary_pos_embedding, mappings, layers,
  param_and_grad_buffer, distrib_optimizer): it answers the CPU.
- `device="cuda"` literals and `pin_memory` (schedules, clip_grads, optimizer, transformer/utils,
  rope_utils): tensor factories read "cuda" as "cpu".
- `Tensor.cuda()` (rope_utils under context parallelism): the identity.
- CUDA random states (tensor_parallel/random: dropout regions, recomputation): the CPU
  generator's.
- `torch.cuda.synchronize` (p2p_communication, checkpoint writers): there is nothing to wait for.
- Dispatch on the name 'torch.cuda.FloatTensor' (optimizer and distrib_optimizer when they are
  built, clip_grads at each step): `cuda_type_names`.

A TorchFunctionMode would be neater than wrapped factories, but it is switched off inside
Tensor.backward(), where activation recomputation runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

FACTORIES = (
    "zeros", "ones", "empty", "tensor", "full", "arange", "empty_like", "zeros_like", "ones_like",
)  # fmt: skip


def install() -> None:
    """Idempotent; call before Megatron builds anything."""
    if torch.cuda.is_available() or getattr(torch.zeros, "reads_cuda_as_cpu", False):
        return
    from megatron.core.tensor_parallel import random as megatron_random

    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    wrapped.reads_cuda_as_cpu = True  # type: ignore[attr-defined]
    return wrapped


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Tensor.type() answers 'torch.cuda.*': for building the optimizer and for its steps."""
    if torch.cuda.is_available():
        yield
        return
    real = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        return answer if args or kwargs else answer.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor.type = real

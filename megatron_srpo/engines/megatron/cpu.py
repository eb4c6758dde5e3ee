"""Tells Megatron-Core 0.16.1 where CUDA is not. The only file that patches anything.

`install()` does nothing when CUDA is there, but for a name that is missing. Each patched site, and
why:

- `torch.cuda.current_device` (asked for a device by rotary_pos_embedding, mappings, layers,
  param_and_grad_buffer, distrib_optimizer): answers the CPU.
- `device="cuda"` literals: the modules in `CUDA_LITERALS` see a `torch` whose tensor factories
  read "cuda" as "cpu". Only these modules: wrapping torch's own factories changes what vLLM
  computes (wrapped `torch.tensor`: log-probs off by whole nats, without an error).
- `Tensor.cuda` (rope_utils under context parallelism): the identity.
- CUDA random states (tensor_parallel/random: dropout regions, recomputation): the CPU
  generator's.
- `torch.cuda.synchronize` (p2p_communication, checkpoint writers): there is nothing to wait for.
- `MoEAlltoAllTokenDispatcher`: its side stream, and the step that waits for counts on their way to
  the host, where they are already.
- `moe_utils.te_general_gemm`: a name that is missing without Transformer Engine, GPU or not (a
  router then ends in a NameError), instead of None.
- Dispatch on the name 'torch.cuda.FloatTensor' (optimizer and distrib_optimizer when they are
  built, clip_grads at each step): `cuda_type_names`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import utils as transformer_utils
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

CUDA_LITERALS = (schedules, clip_grads, optimizer, utils, transformer_utils, rope_utils)
FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "zeros_like", "ones_like")


class TorchWithoutCuda:
    """`torch`, but factories that are asked for "cuda" give CPU tensors."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return _on_cpu(found) if name in FACTORIES else found


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def install() -> None:
    """Before Megatron builds anything; a second call changes nothing."""
    if not moe_utils.HAVE_TE:
        moe_utils.te_general_gemm = None
    if torch.cuda.is_available():
        return
    for module in CUDA_LITERALS:
        vars(module)["torch"] = TorchWithoutCuda()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    dispatcher: Any = MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = "none"
    dispatcher._maybe_dtoh_and_synchronize = _counts_as_numpy


def _counts_as_numpy(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """The all-to-all wants its counts as numpy arrays, which a CPU tensor need not wait for."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            counts = getattr(dispatcher, name)
            if isinstance(counts, torch.Tensor):
                setattr(dispatcher, name, counts.numpy())
    return tokens_per_expert


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

"""What else computes the head's loss?   the sum of the targets' log-probs, each by its own API

A rival that is not installed, or that this GPU or shape is nothing for, is `not_run`. None knows
rows that are not wanted but for a target it ignores, so all rows are wanted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.gpu.result import NotRun

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden states, weight, targets -> summed negative log-prob, differentiable"""


def eager() -> Head:
    """All logits, an fp32 copy of them."""
    return lambda hidden, weight, targets: F.cross_entropy(
        F.linear(hidden, weight).float(), targets, reduction="sum"
    )


def torch_compile() -> Head:
    """The same, fused by the compiler."""
    return torch.compile(eager(), dynamic=False)


def torch_linear_cross_entropy() -> Head:
    """torch 2.13 and later, in chunks: without options it is the eager one."""
    options = imported("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight, targets, reduction="sum", options=options
    )


def megatron() -> Head:
    """Megatron-Core's vocab-parallel cross entropy of fp32 logits."""
    parallel = imported("megatron.core.tensor_parallel")
    state = imported("megatron.core.parallel_state")
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[reportPrivateImportUsage]
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
        state.initialize_model_parallel()

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float().unsqueeze(1)
        return parallel.vocab_parallel_cross_entropy(logits, targets.unsqueeze(1)).sum()

    return head


def liger() -> Head:
    """Liger's Triton kernel: gradients in the forward pass."""
    loss = imported("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def verl() -> Head:
    """verl's Triton kernel, which knows entropies, too."""
    function = imported("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: (
        -function(hidden, weight, targets, 1.0, "none", None)[0].sum()
    )


def cut_cross_entropy() -> Head:
    """Apple's."""
    function = imported("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: function(hidden, weight, targets, reduction="sum")


def quack() -> Head:
    """Products of cuBLAS, CuTe kernels between them."""
    function = imported("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight, targets: function(hidden, weight, targets, reduction="sum")


RIVALS: dict[str, Callable[[], Head]] = {
    "torch eager": eager,
    "torch.compile": torch_compile,
    "F.linear_cross_entropy": torch_linear_cross_entropy,
    "Megatron vocab-parallel cross entropy": megatron,
    "Liger fused linear cross entropy": liger,
    "verl linear cross entropy": verl,
    "Cut Cross Entropy": cut_cross_entropy,
    "quack chunked linear cross entropy": quack,
}


def imported(name: str) -> Any:
    """Raises `NotRun` with the reason."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as lacking:
        reason = f"{type(lacking).__name__}: {lacking}".splitlines()[0]
        raise NotRun(f"{name} cannot be imported: {reason}") from lacking

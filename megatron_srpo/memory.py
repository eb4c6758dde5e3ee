"""How much memory is in use, whose is it, and what to do where there is not enough?"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import psutil
import torch

GIB = 2**30
WIDER = "larger parallel.tp or parallel.pp"
LENT = "colocation.park with optimizer, gradients and weights"
LESS = {
    "start": f"{LENT}, a smaller rollout.kv_cache_bytes, or {WIDER}",
    "sync": f"{LENT}, a smaller rollout.kv_cache_bytes, or a larger rollout.tp",
    "generate": f"{LENT}, a smaller rollout.kv_cache_bytes or rollout.max_num_seqs, or a larger "
    "rollout.tp",
    "train": "parallel.recompute=full, a smaller micro_batch_tokens, larger parallel.tp, "
    "parallel.pp or parallel.cp, or optimizer.offload_fraction",
    "checkpoint": f"parallel.overlap=true, {WIDER}, or optimizer.offload_fraction",
}
"""What makes each phase need less."""
EXHAUSTED = ("out of memory", "cublas_status_alloc_failed")
"""What CUDA, NCCL and cuBLAS call it, who ask the driver themselves."""

this_process = functools.cache(psutil.Process)
"""Asked often, and psutil reads most of /proc/PID to make one; no fork of a trainer asks."""


def peak_gib() -> float:
    """GiB, of this process's GPU, at the most since it was last asked for, whoever holds it:
    torch's allocator knows how much more it had than now, the driver how much is in use now.
    Without a GPU, of the process, now."""
    if not torch.cuda.is_available():
        return this_process().memory_info().rss / GIB
    free, total = torch.cuda.mem_get_info()
    had_more = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return (total - free + had_more) / GIB


def is_exhausted(error: RuntimeError) -> bool:
    """Only torch's allocator has an error of its own for it."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(each in words for each in EXHAUSTED)


def told(
    phase: str, error: BaseException, held: Mapping[str, int], planned_gib: float | None
) -> str:
    """One line: where memory was exhausted, what is there, what was planned, what to change.

    `held`: bytes by owner; of what is left over, activations, buffers and libraries are most.
    """
    words = [f"out of memory in phase {phase!r}: {_first_sentences(error)}"]
    known = {owner: size / GIB for owner, size in held.items() if size}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        known["all else"] = (total - free) / GIB - sum(known.values())
        words.append(f"of {total / GIB:.1f} GiB, {free / GIB:.1f} are free")
    if known:
        words.append("held: " + ", ".join(f"{owner} {gib:.1f} GiB" for owner, gib in known.items()))
    if planned_gib is not None:
        words.append(f"planned for this phase: {planned_gib:.1f} GiB")
    return "; ".join([*words, f"to need less: {LESS[phase]}"])


def _first_sentences(error: BaseException) -> str:
    """torch's message goes on with advice about its allocator."""
    said = " ".join(str(error).split())
    return ". ".join(said.split(". ")[:2]).rstrip(".") or type(error).__name__

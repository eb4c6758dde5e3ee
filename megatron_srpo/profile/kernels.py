"""What did the device do, and in which phase?   a trace's events -> time by phase and family

Of a GPU: its kernels and copies, each in the phase that launched it, since they run later. Of a
CPU: operations, each for the time that it did not spend in others.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

PHASE = "phase: "
"""Begins the names of the ranges that phases are in a trace."""
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
FAMILIES = {
    # The first that is found in a name counts.
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast_|"
    r"cross_device_reduce|send_|recv_",
    "memcpy": r"memcpy|memset|aten::(copy_|_to_copy|to|clone|contiguous)$",
    "optimizer": r"adam|multi_tensor|optimizer|foreach|l2norm",
    "attention": r"attention|attn|flash|fmha|sdpa|softmax_fwd|reshape_and_cache",
    "GEMM": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|linear_logprob|linear_policy_loss|"
    r"onednn|mkldnn|aten::(mm|addmm|bmm|baddbmm|matmul|linear|_grouped_mm|_scaled_mm)$",
    "vLLM's own": r"vllm|^_c::|_c_cache|_moe_c|sampl|gumbel|top_?k|top_?p|block_table|slot_mapping",
    "norm/elementwise": r"norm|elementwise|vectorized|silu|swiglu|rope|rotary|softmax|reduce|"
    r"triton|index|embedding|cat|fill|zero|policy_loss|logprob|"
    r"aten::(add|sub|mul|div|neg|exp|log|sum|mean|rsqrt|pow|where|cos|sin|sigmoid)",
}
UPDATE = "Optimizer.step#"
"""Begins the names of the ranges that torch makes around an optimizer's step: what is asked for
there is the optimizer's, whatever it is called."""
PATTERNS = {family: re.compile(pattern, re.IGNORECASE) for family, pattern in FAMILIES.items()}
OTHER, IDLE = "other", "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took time, in microseconds of the trace."""

    name: str
    start: float
    end: float
    asked: float = 0.0
    """When the host asked for it."""
    in_update: bool = False

    @property
    def family(self) -> str:
        return "optimizer" if self.in_update else family_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """All of a phase in the trace, in seconds."""

    wall: float
    by_family: Mapping[str, float]
    """Of the device; several streams may work at once."""
    idle: float
    """Nothing of its own ran on the device."""


def family_of(name: str) -> str:
    """Of a kernel, or of an operation on a CPU.

    >>> family_of("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN"), family_of("aten::mul")
    ('GEMM', 'norm/elementwise')
    """
    found = (family for family, pattern in PATTERNS.items() if pattern.search(name))
    return next(found, OTHER)


def by_phase(events: Sequence[Mapping[str, Any]]) -> dict[str, PhaseTime]:
    """Of a Chrome trace's events, phases in the order in which they come first."""
    phases = sorted(
        (
            Span(name=e["name"].removeprefix(PHASE), start=e["ts"], end=e["ts"] + e["dur"])
            for e in _complete(events, "user_annotation")
            if e["name"].startswith(PHASE)
        ),
        key=lambda span: span.start,
    )
    updates = [
        (e["ts"], e["ts"] + e["dur"])
        for e in _complete(events, "user_annotation")
        if e["name"].startswith(UPDATE)
    ]
    work = [
        replace(span, in_update=any(start <= span.asked < end for start, end in updates))
        for span in [*on_gpu(events)] or [*on_cpu(events)]
    ]
    starts = [phase.start for phase in phases]
    of_phase: dict[str, list[Span]] = defaultdict(list)
    for span in work:
        place = bisect_right(starts, span.asked) - 1
        if place >= 0 and span.asked < phases[place].end:
            of_phase[phases[place].name].append(span)
    walls: dict[str, float] = defaultdict(float)
    for phase in phases:
        walls[phase.name] += (phase.end - phase.start) / 1e6
    return {name: _time(wall, of_phase[name]) for name, wall in walls.items()}


def _time(wall: float, work: Sequence[Span]) -> PhaseTime:
    by_family: dict[str, float] = defaultdict(float)
    for span in work:
        by_family[span.family] += (span.end - span.start) / 1e6
    idle = max(0.0, wall - covered((span.start, span.end) for span in work) / 1e6)
    return PhaseTime(wall=wall, by_family=by_family, idle=idle)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what at least one of them covers.

    >>> covered([(0, 2), (5, 6), (1, 3)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def on_gpu(events: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    """Kernels and copies, of all streams."""
    asked = {
        e["args"]["correlation"]: e["ts"]
        for cat in LAUNCHES
        for e in _complete(events, cat)
        if "correlation" in e.get("args", {})
    }
    for cat in ON_GPU:
        for e in _complete(events, cat):
            launched = asked.get(e.get("args", {}).get("correlation"), e["ts"])
            yield Span(name=e["name"], start=e["ts"], end=e["ts"] + e["dur"], asked=launched)


def on_cpu(events: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    """What operations did themselves: the pieces of each between those inside it."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for e in _complete(events, "cpu_op"):
        threads[e.get("pid"), e["tid"]].append(e)
    for own in threads.values():
        yield from _pieces(sorted(own, key=lambda e: (e["ts"], -e["dur"])))


def _pieces(ordered: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    """Of one thread, whose operations begin in this order and are one inside the other."""
    stack: list[tuple[str, float]] = []
    """(name, end) of those that are running."""
    now = 0.0
    for e in [*ordered, {"name": "", "ts": float("inf"), "dur": 0.0}]:
        while stack and stack[-1][1] <= e["ts"]:
            name, end = stack.pop()
            if end > now:
                yield Span(name=name, start=now, end=end, asked=now)
            now = max(now, end)
        if stack and e["ts"] > now:
            yield Span(name=stack[-1][0], start=now, end=e["ts"], asked=now)
        now = e["ts"]
        stack.append((e["name"], e["ts"] + e["dur"]))


def _complete(events: Sequence[Mapping[str, Any]], cat: str) -> Iterator[Mapping[str, Any]]:
    return (e for e in events if e.get("ph") == "X" and e.get("cat") == cat)

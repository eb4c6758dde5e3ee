"""How long does it take, how surely, and in how much memory?   several functions in one process

In shuffled order, so that clocks and temperature favour none; device events, medians, quartiles.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType

WARM_UPS, REPETITIONS = 8, 30
Work = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    median_ms: float
    spread_ms: float
    """Between the quartiles."""
    peak_gib: float
    """Allocated at its highest beyond what was there, results included."""

    def numbers(self) -> dict[str, float]:
        return {
            "median_ms": round(self.median_ms, 4),
            "spread_ms": round(self.spread_ms, 4),
            "peak_gib": round(self.peak_gib, 4),
        }


def measure(works: Mapping[str, Work], *, seed: int = 0) -> dict[str, Timing]:
    """Of each, on the current GPU."""
    peaks = {name: peak_gib(work) for name, work in works.items()}
    order = [name for name in works for _ in range(WARM_UPS + REPETITIONS)]
    random.Random(seed).shuffle(order)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        name: [] for name in works
    }
    for name in order:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        works[name]()
        pair[1].record()
        events[name].append(pair)
    torch.cuda.synchronize()
    found: dict[str, Timing] = {}
    for name, pairs in events.items():
        times = [start.elapsed_time(end) for start, end in pairs[WARM_UPS:]]
        low, median, high = statistics.quantiles(times, n=4)
        found[name] = Timing(median_ms=median, spread_ms=high - low, peak_gib=peaks[name])
    return found


def peak_gib(work: Work) -> float:
    """Of the second call: the first may compile."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def kernels_of(work: Work) -> tuple[int, float]:
    """How many kernels it launches, and their microseconds on the device: medians of ten calls.

    A function of a few microseconds takes the host longer to launch than the device to run.
    """
    for _ in range(WARM_UPS):
        work()
    torch.cuda.synchronize()
    counts: list[int] = []
    times: list[float] = []
    for _ in range(10):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        events: Any = profile.events()
        kernels = [e for e in events if e.device_type == DeviceType.CUDA]
        counts.append(len(kernels))
        times.append(sum(e.self_device_time_total for e in kernels))
    return statistics.median_high(counts), statistics.median(times)

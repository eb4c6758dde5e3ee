"""Where do some steps' milliseconds go?   `train --profile steps=3:5` -> RUN/profile/

    trace.json    of the first rank, for chrome://tracing or ui.perfetto.dev
    summary.md    one page: time by phase and family of kernels, MFU, idle share

Phases are ranges in the trace, made whenever the stopwatch changes its phase.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_srpo.metrics import GENERATED
from megatron_srpo.profile.kernels import PHASE, by_phase
from megatron_srpo.profile.page import Work, page
from megatron_srpo.staging import write_durably
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.types import InputError

STEPS = re.compile(r"steps=(\d+):(\d+)")


class Profile(Protocol):
    """Told of each step's beginning, and of its end with what it measured."""

    def begin(self, step: int) -> None: ...

    def end(self, step: int, metrics: Mapping[str, float]) -> None: ...


class NoProfile:
    """Of a run that nobody looks at, and of all ranks but the first."""

    def begin(self, step: int) -> None:
        pass

    def end(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


def parse_steps(text: str, *, first: int, num_steps: int) -> range:
    """`steps=3:5` -> steps 3 and 4. Raises `InputError` if the run will not do all of them.

    >>> parse_steps("steps=3:5", first=0, num_steps=10)
    range(3, 5)
    """
    match = STEPS.fullmatch(text)
    if match is None:
        raise InputError(f"--profile {text}: must look like steps=3:5, which is steps 3 and 4")
    steps = range(int(match[1]), int(match[2]))
    if not steps or steps.start < first or steps.stop > num_steps:
        raise InputError(f"--profile {text}: this run does the steps from {first} to {num_steps}")
    return steps


@dataclass(slots=True, kw_only=True)
class StepProfile:
    """Of the first rank."""

    steps: range
    folder: Path
    stopwatch: Stopwatch
    active_weights: int
    num_gpus: int
    _profiler: Any = field(default=None, init=False)
    _range: Any = field(default=None, init=False)
    _generated: float = field(default=0.0, init=False)
    _trained: float = field(default=0.0, init=False)

    def begin(self, step: int) -> None:
        if step != self.steps.start:
            return
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._show(self.stopwatch.current)
        self.stopwatch.show = self._show

    def end(self, step: int, metrics: Mapping[str, float]) -> None:
        """After the last step: both files, and the page on standard error."""
        if step not in self.steps:
            return
        self._generated += sum(metrics.get(name, 0.0) for name in GENERATED)
        self._trained += metrics.get("tokens/trained", 0.0)
        if step != self.steps[-1]:
            return
        self.stopwatch.show = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._range.__exit__(None, None, None)
        self._range = None
        self._profiler.stop()
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / "trace.json"
        self._profiler.export_chrome_trace(str(trace))
        self._profiler = None
        said = self._page(json.loads(trace.read_text())["traceEvents"])
        write_durably(self.folder / "summary.md", said.encode())
        print(said, file=sys.stderr)

    def _show(self, phase: str) -> None:
        """The stopwatch's phase is another now."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = record_function(PHASE + phase)
        self._range.__enter__()

    def _page(self, events: list[dict[str, Any]]) -> str:
        is_gpu = torch.cuda.is_available()
        work = Work(
            generated=self._generated,
            trained=self._trained,
            active_weights=self.active_weights,
            num_gpus=self.num_gpus,
            device=torch.cuda.get_device_name() if is_gpu else f"{platform.machine()}, no GPU",
        )
        last = self.steps[-1]
        return page(by_phase(events), work, title=f"Steps {self.steps.start} to {last}")

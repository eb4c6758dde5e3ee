"""Where do time and memory go?   By phase; an inner phase's seconds are not its outer one's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_srpo.protocols import Generator
from megatron_srpo.types import Completion, Purpose, Request

T = TypeVar("T")

PHASE_OF: dict[Purpose, str] = {
    "base": "generate",
    "extra": "suffix",
    "suffix": "suffix",
    "localize": "localize",
    "eval": "eval",
    "probe": "sync",
}


@dataclass(slots=True)
class Stopwatch:
    """`current` names the running phase, for displays and watchdogs."""

    current: str = "other"
    num_signs: int = 0
    """Of life, ever: changes of phase, and ticks."""
    peak_gib: Callable[[], float] | None = None
    """The most in use since it was asked last; it is when a phase ends or an inner one begins."""
    show: Callable[[str], None] | None = None
    """Is told the phase that begins, or goes on."""
    _seconds: dict[str, float] = field(default_factory=dict)
    _most_gib: dict[str, float] = field(default_factory=dict)
    _mark: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self.current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def tick(self) -> None:
        """Something has come forward, in the same phase."""
        self.num_signs += 1

    def drawn(self, items: Iterable[T]) -> Iterator[T]:
        """The time that items take to come is not that of whoever draws them: it belongs to the
        phase in which this is called."""
        return self._drawn(iter(items), self.current)

    def _drawn(self, items: Iterator[T], phase: str) -> Iterator[T]:
        with self.phase(phase):
            item = next(items, None)
        while item is not None:
            yield item
            with self.phase(phase):
                item = next(items, None)

    def take(self) -> dict[str, float]:
        """`time/<phase>_s` since the last call, and `time/step_s`, their sum with all the rest; the
        most memory that was in use in a phase, `memory/<phase>_peak_gib`."""
        self._switch(self.current)
        seconds, self._seconds = self._seconds, {}
        most_gib, self._most_gib = self._most_gib, {}
        total = sum(seconds.values())
        named = {f"time/{name}_s": value for name, value in seconds.items()}
        memory = {f"memory/{name}_peak_gib": value for name, value in most_gib.items()}
        return {**named, "time/step_s": total, **memory}

    def _switch(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._mark
        if self.peak_gib is not None:
            before = self._most_gib.get(self.current, 0.0)
            self._most_gib[self.current] = max(before, self.peak_gib())
        if self.show is not None:
            self.show(name)
        self._mark, self.current = now, name
        self.num_signs += 1


@dataclass(frozen=True, slots=True)
class TimedGenerator:
    """Time inside the engine, by what the requests are for."""

    generator: Generator
    stopwatch: Stopwatch

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        if not requests:
            return
        phase = PHASE_OF[requests[0].purpose]
        completions = self.generator.generate(requests)
        while True:
            with self.stopwatch.phase(phase):
                completion = next(completions, None)
            if completion is None:
                return
            yield completion

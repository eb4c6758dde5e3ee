"""Who owns the device?   `with gpu.generating()` / `with gpu.training()`

Trainer and rollout engine live in the same processes and take turns. A phase that begins inside
another is a bug that would show on a GPU as corrupted or exhausted memory: here it fails at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import torch

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.stopping import StopPoints
from megatron_srpo.stopwatch import Stopwatch


@dataclass(slots=True)
class Colocation:
    stopwatch: Stopwatch
    points: StopPoints
    _owner: str | None = field(default=None, init=False)

    @classmethod
    def on(cls, mesh: Mesh) -> Colocation:
        """Of this rank. Where a mesh serves several runs, each counts arrivals of its own."""
        run = mesh.store.add(f"runs/{mesh.rank}", 1)
        points = StopPoints(
            replica=mesh.replica,
            num_ranks=mesh.world_size,
            arrive=lambda name: mesh.store.add(f"{run}/{name}", 1),
            arrived=lambda name: mesh.store.add(f"{run}/{name}", 0),
        )
        return cls(Stopwatch(memory_gib=memory_in_use), points)

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Left when all rollout engines are done. Time inside the engine is told apart by what it
        works on (`TimedGenerator`)."""
        with self._owned("generate"), self.points.section(is_joint=False):
            yield
        with self.stopwatch.phase("wait"):
            self.points.meet()

    def training(self) -> contextlib.AbstractContextManager[None]:
        return self._phase("train")

    def syncing(self) -> contextlib.AbstractContextManager[None]:
        """Both are needed: weights leave the one and enter the other."""
        return self._phase("sync")

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with self._owned(name), self.stopwatch.phase(name):
            yield

    @contextlib.contextmanager
    def _owned(self, name: str) -> Iterator[None]:
        assert self._owner is None, f"phase {name!r} begins inside phase {self._owner!r}"
        self._owner = name
        try:
            yield
        finally:
            self._owner = None


this_process = functools.cache(psutil.Process)
"""Asked often, and psutil reads most of /proc/PID to make one; no fork of a trainer asks."""


def memory_in_use() -> float:
    """GiB: of this process's GPU, whoever holds it; without one, of the process."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return this_process().memory_info().rss / 2**30

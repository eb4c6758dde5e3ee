"""Who owns the device?   `with gpu.syncing()`, `generating()`, `training()`, `saving()`

Trainer and rollout engine live in the same processes and take turns with its memory (`turns.py`);
what changes hands does so when a phase begins. A phase that begins inside another is a bug that
would show on a GPU as corrupted or exhausted memory: here it fails at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_srpo.memory import is_exhausted, peak_gib, told
from megatron_srpo.stopping import StopPoints
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.turns import AllStay, Turns
from megatron_srpo.types import AlarmError

if TYPE_CHECKING:
    from megatron_srpo.engines.megatron.mesh import Mesh


@dataclass(slots=True)
class Colocation:
    stopwatch: Stopwatch
    points: StopPoints
    turns: Turns = field(default_factory=AllStay)
    """Until there are both engines, nobody lends anything."""
    planned_gib: Mapping[str, float] = field(default_factory=dict)
    """By phase, where there is a plan."""
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
        return cls(Stopwatch(peak_gib=peak_gib), points)

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Left when all rollout engines are done. Time inside the engine is told apart by what it
        works on (`TimedGenerator`)."""
        with self._owned("generate", self.turns.generate), self.points.section(is_joint=False):
            yield
        with self.stopwatch.phase("wait"):
            self.points.meet()

    def training(self) -> contextlib.AbstractContextManager[None]:
        return self._phase("train", self.turns.train)

    def syncing(self) -> contextlib.AbstractContextManager[None]:
        """Both are needed: weights leave the one and enter the other (`WeightSync`)."""
        return self._phase("sync", self.turns.sync)

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """All of the trainer's state is needed."""
        return self._phase("checkpoint", self.turns.train)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """The two engines."""
        with self._owned("start", lambda: None):
            yield

    @contextlib.contextmanager
    def _phase(self, name: str, begin: Callable[[], None]) -> Iterator[None]:
        with self._owned(name, begin), self.stopwatch.phase(name):
            yield

    @contextlib.contextmanager
    def _owned(self, name: str, begin: Callable[[], None]) -> Iterator[None]:
        """Raises `AlarmError` where memory is exhausted: the same would happen again."""
        assert self._owner is None, f"phase {name!r} begins inside phase {self._owner!r}"
        self._owner = name
        try:
            with self.stopwatch.phase("swap"):
                begin()
            yield
        except RuntimeError as error:
            # An alarm may quote whoever ran out of memory: a reward's process, say.
            if isinstance(error, AlarmError) or not is_exhausted(error):
                raise
            raise AlarmError(
                told(name, error, self.turns.held(), self.planned_gib.get(name))
            ) from error
        finally:
            self._owner = None

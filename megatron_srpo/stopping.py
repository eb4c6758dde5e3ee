"""Where does a run stop when it is asked to?   at one point, the same on all ranks that need it

A rank may stop only where no other will wait for it. Engine steps of one rollout engine, and
micro-batches of all ranks, are such points if each rank stops at the same one. Nobody knows how
far the others are, and a collective that asks would cost every step for a question that is asked
once. So the ranks agree when it is asked, in a thread beside each rank's work (`guard.py`):

1. Every rank holds still at its next point and says which points it has passed.
2. From all answers `first_unpassed` tells each the first point that nobody has passed.
3. Every rank goes on to there. Nobody stopped before, so everybody arrives.

Points come in sections, which every rank enters in the same order: generating, where each rollout
engine counts its own steps; waiting for the other engines; and the micro-batches of an update
until the first of them changes weights. Between sections nobody stops.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

LONGEST_PAUSE_S = 0.25
"""Between two looks at who has arrived."""


class StopRequested(BaseException):
    """Somebody wants the run to end; nothing is wrong with it. No `Exception`, like
    KeyboardInterrupt: a user's rule must not catch it."""


class Point(NamedTuple):
    """Points are passed in this order."""

    section: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """What one rank has passed."""

    replica: int
    section: int = 0
    """The last in which it passed a point."""
    is_joint: bool = True
    """Its points are those of all ranks, not of one rollout engine."""
    num_passed: int = 0
    """Of that section's points."""

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str | bytes) -> Position:
        return cls(**json.loads(text))


def first_unpassed(positions: Sequence[Position]) -> dict[int, Point]:
    """Replica -> the point at which its ranks stop, of all ranks' positions.

    In the section that somebody has come to, whoever is behind will come to it too. Where engines
    count on their own, the ranks of one are never more than a point apart, and their first
    unpassed one is theirs alone.
    """
    last = max(position.section for position in positions)
    there = [position for position in positions if position.section == last]
    stops: dict[int, Point] = {}
    for replica in {position.replica for position in positions}:
        peers = [p for p in there if p.is_joint or p.replica == replica]
        stops[replica] = Point(last, max((p.num_passed for p in peers), default=0))
    return stops


@dataclass(slots=True, kw_only=True)
class StopPoints:
    """One rank's view. Of a run that nobody can stop if `agree` is never called."""

    replica: int = 0
    num_ranks: int = 1
    arrive: Callable[[str], int] = lambda name: 1
    """Counts this rank in under a name; how many are there (`store.add(name, 1)`)."""
    arrived: Callable[[str], int] = lambda name: 1
    num_points: int = 0
    """Passed ever: a sign of life."""
    _position: Position = field(init=False)
    _section: int = 0
    _inside: bool = False
    _is_joint: bool = False
    _stop: Point | None = None
    _still: threading.Lock = field(default_factory=threading.Lock)
    """Held while a point is passed, and while the ranks agree."""

    def __post_init__(self) -> None:
        self._position = Position(replica=self.replica)

    @contextlib.contextmanager
    def section(self, *, is_joint: bool) -> Iterator[None]:
        """Inside there are points; all ranks enter it."""
        self._section += 1
        self._inside, self._is_joint = True, is_joint
        try:
            yield
        finally:
            self._inside = False

    @property
    def num_passed(self) -> int:
        """In this section."""
        return self._position.num_passed if self._position.section == self._section else 0

    def step(self) -> None:
        """Passes the next point; raises `StopRequested` at the agreed one."""
        if not self.passes(self.num_passed):
            raise StopRequested

    def passes(self, index: int) -> bool:
        """The same of a point that may have been passed already; False: stop here."""
        self.num_points += 1
        if not self._inside:
            return True
        with self._still:
            return self._pass(Point(self._section, index), is_joint=self._is_joint)

    def _pass(self, point: Point, *, is_joint: bool) -> bool:
        if self._stop is not None and point >= self._stop:
            return False
        self._position = Position(
            replica=self.replica,
            section=point.section,
            is_joint=is_joint,
            num_passed=max(point.index + 1, self.num_passed),
        )
        return True

    def meet(self) -> None:
        """Waits until all ranks are here; raises `StopRequested` if they are to stop before.

        A section of one point, passed by whoever has seen all others arrive. No collective: who
        waits in one cannot stop.
        """
        self._section += 1
        point, name, pause = Point(self._section, 0), f"meet/{self._section}", 0.001
        self.arrive(name)
        while not self._leaves(point, name):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _leaves(self, point: Point, name: str) -> bool:
        with self._still:
            if self._stop is not None and point >= self._stop:
                raise StopRequested
            all_here = self.arrived(name) == self.num_ranks
            return all_here and self._pass(point, is_joint=True)

    def agree(self, exchange: Callable[[Position], Mapping[int, Point]]) -> None:
        """In another thread: `exchange` says what this rank has passed, and hears from all where
        each replica stops."""
        with self._still:
            self._stop = exchange(self._position)[self.replica]

"""Ranks that are asked to stop do so where nobody waits for them."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from megatron_srpo.stopping import Point, Position, StopPoints, StopRequested, first_unpassed


def at(replica: int, section: int, num_passed: int, *, is_joint: bool = False) -> Position:
    return Position(replica=replica, section=section, is_joint=is_joint, num_passed=num_passed)


def test_each_engine_stops_at_its_own_first_unpassed_point():
    positions = [at(0, 4, 7), at(0, 4, 8), at(1, 4, 2), at(1, 4, 2)]
    assert first_unpassed(positions) == {0: Point(4, 8), 1: Point(4, 2)}


def test_an_engine_that_has_not_begun_yet_stops_before_its_first_step():
    positions = [at(0, 4, 7), at(1, 3, 5, is_joint=True)]
    assert first_unpassed(positions) == {0: Point(4, 7), 1: Point(4, 0)}


def test_micro_batches_are_those_of_all_ranks():
    positions = [at(0, 3, 1, is_joint=True), at(1, 3, 3, is_joint=True), at(2, 2, 1, is_joint=True)]
    assert set(first_unpassed(positions).values()) == {Point(3, 3)}


def test_a_position_survives_the_way_through_a_store():
    position = at(3, 2, 9, is_joint=True)
    assert Position.parse(position.dump()) == position


def test_nobody_stops_who_is_not_asked_to():
    points = StopPoints()
    with points.section(is_joint=False):
        for _ in range(5):
            points.step()
    points.meet()
    with points.section(is_joint=True):
        assert all(points.passes(index) for index in range(3))
    assert points.num_points == 8


def test_outside_of_sections_nobody_stops():
    points = StopPoints()
    points.agree(lambda position: {0: Point(0, 0)})
    points.step()
    with points.section(is_joint=False), pytest.raises(StopRequested):
        points.step()


def test_who_is_asked_in_a_section_stops_at_its_next_point():
    points = StopPoints(replica=2)
    with points.section(is_joint=True):
        assert points.passes(0) and points.passes(1) and points.passes(0)
        assert points.num_passed == 2
        points.agree(lambda position: first_unpassed([position]))
        assert points.passes(0) and points.passes(1)  # passed before: a later chunk of it
        assert not points.passes(2)


@dataclass
class Cluster:
    """Threads as ranks: engines of `tp` ranks in lock-step, all ranks together in collectives."""

    num_ranks: int
    tp: int
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.ranks = [self._points(rank) for rank in range(self.num_ranks)]
        self.engines = [threading.Barrier(self.tp) for _ in range(self.num_ranks // self.tp)]
        self.world = threading.Barrier(self.num_ranks)
        self.agreeing = threading.Barrier(self.num_ranks)
        self.said: list[Position | None] = [None] * self.num_ranks
        self.stopped: list[tuple[str, int, int] | None] = [None] * self.num_ranks
        self.steps = [[self.rng.randrange(1, 40) for _ in self.engines] for _ in range(6)]

    def _points(self, rank: int) -> StopPoints:
        def add(name: str, number: int) -> int:
            with self.lock:
                self.counts[name] += number
                return self.counts[name]

        return StopPoints(
            replica=rank // self.tp,
            num_ranks=self.num_ranks,
            arrive=lambda name: add(name, 1),
            arrived=lambda name: add(name, 0),
        )

    def work(self, rank: int) -> None:
        """A loop like the run's: engine steps, a meeting, a collective, micro-batches, a sync."""
        points, engine = self.ranks[rank], rank // self.tp
        try:
            for step in range(6):
                with points.section(is_joint=False):
                    for _ in range(self.steps[step][engine]):
                        points.step()
                        self.engines[engine].wait(10)
                points.meet()
                self.world.wait(10)
                with points.section(is_joint=True):
                    if not all(points.passes(index) for index in range(8)):
                        raise StopRequested
                self.world.wait(10)
        except StopRequested:
            kind = "update" if points._inside or points._is_joint else "engine"
            self.stopped[rank] = (kind, points._section, points.num_passed)

    def ask(self, rank: int) -> None:
        def exchange(position: Position) -> dict[int, Point]:
            self.said[rank] = position
            self.agreeing.wait(10)
            return first_unpassed([said for said in self.said if said is not None])

        self.ranks[rank].agree(exchange)


def together(num: int, job: Callable[[int], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=job, args=(rank,), daemon=True) for rank in range(num)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("tp", [1, 2])
def test_whenever_ranks_are_asked_none_waits_for_one_that_has_stopped(seed: int, tp: int):
    """A rank that waited for one that is gone would break a barrier; its thread would fail."""
    rng = random.Random(seed)
    cluster = Cluster(num_ranks=4, tp=tp, rng=rng)
    working = together(4, cluster.work)
    threading.Event().wait(rng.random() * 0.008)
    asking = together(4, cluster.ask)
    for thread in working + asking:
        thread.join(20)
        assert not thread.is_alive()
    assert not cluster.world.broken and not any(engine.broken for engine in cluster.engines)
    if any(cluster.stopped):
        assert all(cluster.stopped), cluster.stopped
        for engine in range(4 // tp):
            of_engine = cluster.stopped[engine * tp : (engine + 1) * tp]
            assert len({(kind, count) for kind, _, count in filter(None, of_engine)}) == 1

"""Seconds by phase, on a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import pytest

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.stopwatch import PHASE_OF, Stopwatch, TimedGenerator
from megatron_srpo.types import Completion, Purpose, Request


class Clock:
    """Stands still until it is told that seconds passed."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def stopwatch() -> Stopwatch:
    return Stopwatch(_mark=0.0)


def test_an_inner_phases_seconds_are_not_its_outer_ones(clock: Clock):
    watch = stopwatch()
    with watch.phase("outer"):
        clock.passes(1)
        with watch.phase("inner"):
            clock.passes(10)
        clock.passes(2)
    clock.passes(100)
    assert watch.take() == {
        "time/outer_s": 3,
        "time/inner_s": 10,
        "time/other_s": 100,
        "time/step_s": 113,
    }


def test_taking_begins_anew_also_in_the_middle_of_a_phase(clock: Clock):
    watch = stopwatch()
    with watch.phase("train"):
        clock.passes(3)
        assert watch.take()["time/train_s"] == 3
        clock.passes(4)
    clock.passes(1)
    taken = watch.take()
    assert (taken["time/train_s"], taken["time/step_s"]) == (4, 5)


def test_a_phase_that_comes_twice_is_added_up(clock: Clock):
    watch = stopwatch()
    for seconds in (1, 2):
        with watch.phase("reward"):
            clock.passes(seconds)
    assert watch.take()["time/reward_s"] == 3


def test_a_phase_that_fails_ends_and_keeps_its_seconds(clock: Clock):
    watch = stopwatch()
    with pytest.raises(KeyError), watch.phase("train"):
        clock.passes(2)
        raise KeyError
    assert watch.current == "other"
    clock.passes(1)
    assert watch.take() == {"time/train_s": 2, "time/other_s": 1, "time/step_s": 3}


def test_the_running_phase_has_a_name(clock: Clock):
    watch = stopwatch()
    with watch.phase("a"):
        with watch.phase("b"):
            assert watch.current == "b"
        assert watch.current == "a"
    assert watch.current == "other"


class SlowGenerator(FakeGenerator):
    """Each completion takes five seconds."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(lambda context, rng: "1")
        self._clock = clock

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for completion in super().generate(requests):
            self._clock.passes(5)
            yield completion


def request(purpose: Purpose) -> Request:
    return Request(
        id="r",
        purpose=purpose,
        context=np.array([65], np.int32),
        max_tokens=4,
        temperature=1.0,
        seed=0,
    )


@pytest.mark.parametrize(
    "purpose, phase",
    [
        ("base", "generate"),
        ("extra", "suffix"),
        ("suffix", "suffix"),
        ("localize", "localize"),
        ("eval", "eval"),
        ("probe", "sync"),
    ],
)
def test_time_in_the_engine_counts_for_what_is_generated_and_nothing_else(
    clock: Clock, purpose: Purpose, phase: str
):
    watch = stopwatch()
    timed = TimedGenerator(SlowGenerator(clock), watch)
    for _ in timed.generate([request(purpose), request(purpose)]):
        clock.passes(1)  # what is done between completions is not the engine's
    taken = watch.take()
    assert (taken[f"time/{phase}_s"], taken["time/other_s"]) == (10, 2)


def test_every_purpose_has_a_phase():
    assert set(PHASE_OF) == set(get_args(Purpose))


def test_a_timed_generator_gives_what_its_engine_gives(clock: Clock):
    requests = [request("base"), request("base")]
    plain = FakeGenerator(lambda context, rng: context * 2)
    timed = TimedGenerator(plain, stopwatch())
    assert [c.token_ids.tolist() for c in timed.generate(requests)] == [[65, 65, 0]] * 2
    assert [*timed.generate([])] == []
    assert len(plain.seen) == 1  # the engine is not asked for nothing


def test_time_in_which_items_come_is_the_outer_phase_s(clock: Clock):
    watch = stopwatch()

    def items() -> Iterator[Completion]:
        for done in TimedGenerator(SlowGenerator(clock), watch).generate([request("base")]):
            clock.passes(3)
            yield done

    with watch.phase("outer"):
        drawn = watch.drawn(items())
        with watch.phase("reward"):
            for _ in drawn:
                clock.passes(7)
    taken = watch.take()
    assert (taken["time/generate_s"], taken["time/reward_s"], taken["time/outer_s"]) == (5, 7, 3)


def test_memory_is_the_most_that_was_in_use_at_the_ends_of_a_phase(clock: Clock):
    in_use = iter([1.0, 5.0, 9.0, 2.0, 3.0, 4.0])
    watch = Stopwatch(_mark=0.0, peak_gib=lambda: next(in_use))
    with watch.phase("outer"), watch.phase("inner"):  # 1: other, 5: outer
        pass  # 9: inner, 2: outer
    assert {k: v for k, v in watch.take().items() if k.startswith("memory/")} == {  # 3: other
        "memory/other_peak_gib": 3.0,
        "memory/outer_peak_gib": 5.0,
        "memory/inner_peak_gib": 9.0,
    }
    assert watch.take()["memory/other_peak_gib"] == 4.0

"""Math-Verify says of every pair what the table says, gives up in time, and in its own thread."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_srpo.rewards import math_verify as module
from megatron_srpo.rewards.math_verify import math_verify
from megatron_srpo.types import Score
from tests.unit.builders import prompt
from tests.unit.math_pairs import Pair, pairs, said

LIMIT_S = 2
GRACE_S = 10.0
RIGHT, WRONG = Score(value=1.0, correct=True), Score(value=0.0, correct=False)


@pytest.fixture(autouse=True, scope="module")
def _a_shorter_limit() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LIMIT_S", LIMIT_S)
        yield


@pytest.fixture(scope="module")
def graded() -> list[tuple[Pair, str, float]]:
    """(pair, verdict, seconds)"""
    results: list[tuple[Pair, str, float]] = []
    for pair in pairs():
        began = time.monotonic()
        verdict = said("math_verify", pair)
        results.append((pair, verdict, time.monotonic() - began))
    return results


def test_it_says_of_every_pair_what_it_said_when_the_table_was_written(
    graded: list[tuple[Pair, str, float]],
):
    changed = [(p.gold, p.answer, verdict) for p, verdict, _ in graded if verdict != p.math_verify]
    assert changed == []


def test_no_pair_outlasts_the_three_limits(graded: list[tuple[Pair, str, float]]):
    late = [(pair.answer, s) for pair, _, s in graded if s > 3 * LIMIT_S + GRACE_S]
    assert late == []


@pytest.mark.parametrize("gold", ["", "}{", r"\frac{1}{0}", r"\langle 1,2\rangle"])
def test_a_right_answer_that_it_cannot_read_gives_no_verdict_to_anybody(gold: str):
    for answer in (gold, "1"):
        score = math_verify(prompt(answer=gold), rf"\boxed{{{answer}}}")
        assert not score.correct and score.failure and repr(gold) in score.failure


def test_an_answer_that_it_cannot_read_is_wrong():
    assert math_verify(prompt(answer="1"), r"\boxed{\langle 1,2\rangle}") == WRONG


def test_nothing_is_picked_from_the_middle_of_an_answer():
    assert math_verify(prompt(answer=r"\frac{1}{2}"), r"\boxed{^ \frac{1}{2} ^}") == WRONG


def test_the_right_answer_decides_what_may_be_left_out():
    """So their order matters: 1 < x < 2 is answered by the set, the set not by 1 < x < 2."""
    assert math_verify(prompt(answer="1<x<2"), r"\boxed{(1,2)}") == RIGHT
    assert math_verify(prompt(answer="(1,2)"), r"\boxed{1<x<2}") == WRONG


def test_after_an_alarm_the_process_has_its_own_handler_and_no_alarm_is_left(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "LIMIT_S", 1)
    mine = signal.signal(signal.SIGALRM, lambda *_: None)
    handler = signal.getsignal(signal.SIGALRM)
    try:
        assert math_verify(prompt(answer="7"), r"\boxed{100000000!}") == WRONG
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.alarm(0) == 0
    finally:
        signal.signal(signal.SIGALRM, mine)


def test_in_a_thread_that_cannot_be_alarmed_it_raises_and_does_not_grade():
    with ThreadPoolExecutor(1) as other, pytest.raises(ValueError, match="thread"):
        other.submit(math_verify, prompt(answer="7"), r"\boxed{7}").result()


def test_sympy_is_kept_from_numbers_that_no_alarm_interrupts():
    from sympy.external.gmpy import GROUND_TYPES

    assert os.environ["SYMPY_GROUND_TYPES"] == GROUND_TYPES == "python"

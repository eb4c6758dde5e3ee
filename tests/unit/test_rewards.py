"""Answers are compared as text; where an answer stands is read as the reward's name says."""

from __future__ import annotations

import pytest

from megatron_srpo.rewards import REWARDS, reward_named
from megatron_srpo.rewards.boxed_words import boxed_words
from megatron_srpo.rewards.exact import boxed, last_boxed, last_line
from megatron_srpo.types import Score
from tests.unit.builders import prompt

RIGHT, WRONG = Score(value=1.0, correct=True), Score(value=0.0, correct=False)


@pytest.mark.parametrize(
    "response, expected",
    [
        ("5\n12", RIGHT),
        ("12", RIGHT),
        ("5\n 12 ", RIGHT),
        ("5\n12\n", WRONG),
        ("12\n5", WRONG),
        ("5\n112", WRONG),
        ("5\n012", WRONG),
        ("", WRONG),
    ],
)
def test_the_last_line_is_the_answer(response: str, expected: Score):
    assert last_line(prompt(answer="12"), response) == expected


@pytest.mark.parametrize(
    "response, expected",
    [
        (r"so \boxed{12}", RIGHT),
        (r"\boxed{ 12 } it is", RIGHT),
        (r"\boxed{12} no, \boxed{13}", WRONG),
        (r"\boxed{13} no, \boxed{12}", RIGHT),
        (r"\boxed{12} and \boxed{1", RIGHT),
        ("12", WRONG),
        ("", WRONG),
    ],
)
def test_the_last_whole_box_is_the_answer(response: str, expected: Score):
    assert boxed(prompt(answer=" 12 "), response) == expected


def test_an_empty_box_is_no_missing_box():
    assert boxed(prompt(answer=""), r"\boxed{}") == RIGHT
    assert boxed(prompt(answer=""), "nothing") == WRONG


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a\boxed{b}c}", "b"),
        (r"\boxed{1}}", "1"),
        (r"\boxed{{}", None),
        (r"\boxed{1} \boxed{{2}", "1"),
        ("boxed{1}", None),
    ],
)
def test_braces_of_a_box_balance(text: str, content: str | None):
    assert last_boxed(text) == content


def test_what_is_read_in_place_is_peeled_a_few_times_only():
    """A response of nothing but \\text{\\text{... would keep the trainer waiting for seconds."""

    def said(depth: int) -> str | None:
        return boxed_words(r"\boxed{" + r"\text{" * depth + "B" + "}" * depth + "}")

    assert (said(10), said(11)) == ("B", r"\text{B}")


def test_a_response_of_nothing_but_open_boxes_is_read_once():
    assert last_boxed(r"\boxed{1}" + r"\boxed{" * 20_000) == "1"


def test_rewards_are_found_under_the_names_that_the_config_allows():
    assert reward_named("last_line", timeout_s=1) is last_line
    assert reward_named("boxed", timeout_s=1) is boxed
    for name in REWARDS:
        assert callable(reward_named(name, timeout_s=60, sandbox="limits"))

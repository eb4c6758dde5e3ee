"""A short answer is the whole box, or is found anywhere as the paper does."""

from __future__ import annotations

import pytest

from megatron_srpo.rewards.short import short, short_lax
from tests.unit.builders import prompt


@pytest.mark.parametrize(
    "answer, response",
    [
        ("iron oxide", r"\boxed{iron oxide}"),
        ("iron oxide", r"it is \boxed{\text{Iron  Oxide}.}"),
        (r"\text{Iron oxide.}", r"\boxed{IRON OXIDE}"),
        ("STRASSE", r"\boxed{Straße}"),
        ("-1.5", r"\boxed{-1.5}"),
        (r"H_{2}O", r"\boxed{H_{2}O}"),
        ("iron", r"\boxed{gold} no, \boxed{iron}"),
    ],
)
def test_the_last_box_is_the_answer_whatever_its_case_and_spaces(answer: str, response: str):
    assert short(prompt(answer=answer), response).correct


@pytest.mark.parametrize(
    "answer, response",
    [
        ("iron", "iron"),
        ("iron", r"\boxed{}"),
        ("iron", r"\boxed{not iron}"),
        ("iron", r"\boxed{iron oxide}"),
        ("iron", r"\boxed{irons}"),
        ("iron", r"\boxed{iron!}"),
        ("iron", r"\boxed{iron} no, \boxed{gold}"),
        ("1.5", r"\boxed{15}"),
        ("-5", r"\boxed{5}"),
        ("iron oxide", r"\boxed{ironoxide}"),
    ],
)
def test_more_or_less_than_the_answer_is_wrong(answer: str, response: str):
    assert not short(prompt(answer=answer), response).correct


@pytest.mark.parametrize(
    "answer, response, correct",
    [
        ("Iron oxide", "I think: IRON   oxide!", True),
        ("iron", "not iron", True),
        ("15", "215", True),
        ("-1.5", "15", True),
        ("(iron)", "iron", True),
        ("iron oxide", "iron (II) oxide", False),
        ("iron oxide", "ironoxide", False),
        ("iron", "", False),
    ],
)
def test_the_paper_finds_the_answer_anywhere(answer: str, response: str, correct: bool):
    assert short_lax(prompt(answer=answer), response).correct == correct


@pytest.mark.parametrize("reward", [short, short_lax])
@pytest.mark.parametrize("answer", ["", " . "])
def test_a_right_answer_of_nothing_has_no_verdict(reward, answer: str):
    score = reward(prompt(answer=answer), r"\boxed{}")
    assert not score.correct and score.failure

"""A choice is one letter in a box, or what the paper takes for one."""

from __future__ import annotations

import pytest

from megatron_srpo.rewards.choice import choice, choice_lax
from tests.unit.builders import prompt

B = prompt(answer="B")


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{B}",
        r"\boxed{b}",
        r"\boxed{ B. }",
        r"\boxed{(B)}",
        r"\boxed{( B ).}",
        r"\boxed{B)}",
        r"\boxed{\text{B}}",
        r"\boxed{\textbf{(B)}.}",
        r"\boxed{\mathrm{\text{B}}}",
        r"\boxed{A} no, \boxed{B}",
        r"\boxed{B} \boxed{A",
        r"\boxed{B}, not A. The answer is A",
    ],
)
def test_one_letter_in_the_last_box_is_a_choice(response: str):
    assert choice(B, response).correct


@pytest.mark.parametrize(
    "response",
    [
        "",
        "B",
        "The answer is B.",
        r"\boxed{}",
        r"\boxed{A}",
        r"\boxed{B} no, \boxed{A}",
        r"\boxed{B} \boxed{}",
        r"\boxed{A, B}",
        r"\boxed{AB}",
        r"\boxed{BB}",
        r"\boxed{B: 12}",
        r"\boxed{B or C}",
        r"\boxed{(B}",
        r"\boxed{B..}",
        r"\boxed{1}",
        r"\boxed{\text{A}\text{B}}",
        r"\boxed B",
    ],
)
def test_anything_else_is_no_choice(response: str):
    assert not choice(B, response).correct


@pytest.mark.parametrize(
    "response, letter",
    [
        (r"\boxed{B} and the answer is C", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{A} \boxed{B}", "B"),
        (r"\boxed{(A)} so B)", "B"),
        ("answer: (B) or D.", "B"),
        ("The Answer is a, the answer is b", "B"),
        ("the answer is because", "B"),
        ("C) is wrong\nit is B. \nD", "B"),
        ("it is b)", "B"),
        ("A or B", "B"),
        ("I say B", "B"),
        ("B.", "B"),
        ("So B it is", "B"),
        ("so b it is", None),
        ("Because", None),
        (r"\boxed{K}", None),
        ("", None),
    ],
)
def test_the_papers_choice_is_looked_for_everywhere(response: str, letter: str | None):
    chosen = [x for x in "ABCDEFGHIJK" if choice_lax(prompt(answer=x), response).correct]
    assert chosen == ([letter] if letter else [])


@pytest.mark.parametrize("reward", [choice, choice_lax])
def test_a_right_answer_of_either_case_is_a_letter_and_anything_else_has_no_verdict(reward):
    assert reward(prompt(answer=" b "), r"\boxed{B}").correct
    for answer in ("", "12", "AB", "(B)", "é"):
        score = reward(prompt(answer=answer), r"\boxed{B}")
        assert not score.correct and score.failure and repr(answer) in score.failure

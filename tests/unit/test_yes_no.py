"""Yes is yes in a box, or the last yes or no that the paper finds."""

from __future__ import annotations

import pytest

from megatron_srpo.rewards.yes_no import yes_no, yes_no_lax
from tests.unit.builders import prompt

YES, NO = prompt(answer="yes"), prompt(answer=" No ")


@pytest.mark.parametrize(
    "response, said",
    [
        (r"\boxed{yes}", "yes"),
        (r"\boxed{ Yes. }", "yes"),
        (r"\boxed{\text{YES}}", "yes"),
        (r"\boxed{no}", "no"),
        (r"\boxed{yes} wait, \boxed{no}", "no"),
        (r"\boxed{yes}, there is no other", "yes"),
        (r"\boxed{yes, it is}", None),
        (r"\boxed{yes or no}", None),
        (r"\boxed{not yes}", None),
        (r"\boxed{y}", None),
        (r"\boxed{true}", None),
        (r"\boxed{}", None),
        ("yes", None),
        ("", None),
    ],
)
def test_the_last_box_holds_yes_or_no_alone(response: str, said: str | None):
    assert yes_no(YES, response).correct == (said == "yes")
    assert yes_no(NO, response).correct == (said == "no")


@pytest.mark.parametrize(
    "response, said",
    [
        ("Yes", "yes"),
        ("no, yes", "yes"),
        (r"\boxed{yes}, there is no other", "no"),
        ("NO!", "no"),
        ("yesterday nobody knows", None),
        ("", None),
    ],
)
def test_the_paper_takes_the_last_yes_or_no_anywhere(response: str, said: str | None):
    assert yes_no_lax(YES, response).correct == (said == "yes")
    assert yes_no_lax(NO, response).correct == (said == "no")


@pytest.mark.parametrize("reward", [yes_no, yes_no_lax])
@pytest.mark.parametrize("answer", ["", "true", "yes no"])
def test_any_other_right_answer_has_no_verdict(reward, answer: str):
    score = reward(prompt(answer=answer), r"\boxed{yes}")
    assert not score.correct and score.failure and repr(answer) in score.failure

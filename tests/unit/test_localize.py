"""What the policy is asked about its failed response, and how its answer is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_srpo.config_method import LocalizeConfig
from megatron_srpo.localize import PARSERS, localization_context, parse_boxed, parse_verdicts
from tests.unit.builders import TOKENIZER, config, prompt, rollout, text_of


@pytest.mark.parametrize(
    "answer, expected",
    [
        (r"\boxed{1}", 0),
        (r"\boxed{5}", 4),
        (r"first \boxed{4}, no: \boxed{2} it is", 1),
        (r"\boxed{ 3 }", 2),
        (r"\boxed{0}", "no_error"),
        (r"\boxed{2} then \boxed{0}", "no_error"),
        (r"\boxed{6}", "unparsed"),
        (r"\boxed{2} then \boxed{6}", "unparsed"),
        (r"\boxed{-1}", "unparsed"),
        (r"\boxed{two}", "unparsed"),
        (r"Step 3", "unparsed"),
        (r"\boxed{3", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_the_last_boxed_number_names_a_thought_from_one(answer: str, expected: int | str):
    assert parse_boxed(answer, 5) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("-", 0),
        ("8+3+1-", 2),
        ("+ + -  -", 2),
        ("+++", "no_error"),
        ("++++-", "no_error"),
        ("++", "unparsed"),
        ("+-", 1),
        ("--+", 0),
        ("+--", 1),
        ("", "unparsed"),
        ("1 2 3", "unparsed"),
    ],
)
def test_the_first_minus_sign_names_a_thought(answer: str, expected: int | str):
    assert parse_verdicts(answer, 3) == expected


@given(st.text(alphabet="+-1 a\\boxed{}0", max_size=40), st.integers(1, 6))
def test_a_named_thought_always_exists(answer: str, num_thoughts: int):
    for parse in PARSERS.values():
        verdict = parse(answer, num_thoughts)
        assert verdict in ("no_error", "unparsed") or 0 <= int(verdict) < num_thoughts


def test_a_number_of_any_length_is_read_as_an_answer_that_names_no_thought():
    assert parse_boxed(r"\boxed{" + "9" * 5000 + "}", 5) == "unparsed"


def question(template: str, text: str = "1</t>\n 2 </t>\n3", *, chat: bool = False) -> str:
    cfg = LocalizeConfig(template=template, chat=chat)
    thoughts = config(thoughts={"delimiter": "</t>", "max_tokens": 20})
    failed = rollout(text, of=prompt("What?", answer="SECRET"), cfg=thoughts)
    return text_of(localization_context(failed, TOKENIZER, cfg, "</t>"))


def test_steps_are_numbered_from_one_without_delimiter_and_space():
    assert question("{steps}") == "Step 1: 1\nStep 2: 2\nStep 3: 3\n"


def test_the_response_is_shown_as_it_stands():
    assert question("{prompt}|{response}|") == "What?|1</t>\n 2 </t>\n3|"


def test_the_question_is_the_template_filled_and_nothing_else():
    assert question("A {{1}} {prompt} B") == "A {1} What? B"


def test_a_chat_question_goes_through_the_chat_template_as_the_users_message():
    assert question("{prompt}!", chat=True) == "<user>What?!"


def test_the_default_question_shows_problem_and_steps_and_never_the_answer():
    asked = question(LocalizeConfig().template)
    assert asked.startswith("What?\n\nStep 1: 1\nStep 2: 2\nStep 3: 3\n")
    assert asked.endswith("Finish with \\boxed{step number}.\n")
    assert "SECRET" not in asked

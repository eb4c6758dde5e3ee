"""The paper's grader: rules that rewrite an answer, one by one, and its verdict on every pair."""

from __future__ import annotations

import pytest

from megatron_srpo.rewards.math_string import math_string, normalized
from tests.unit.builders import prompt
from tests.unit.math_pairs import pairs, said


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1 +\n 2", "1+2"),
        (r"10,\!000", "10,000"),
        (r"\\pi", r"\pi"),
        (r"\tfrac{1}{2}+\dfrac{1}{3}", r"\frac{1}{2}+\frac{1}{3}"),
        (r"\left(1,2\right]", "(1,2]"),
        (r"30^\circ", "30"),
        (r"30^{\circ}", "30"),
        (r"\$5", "5"),
        ("$5$", "$5$"),
        (r"5\text{ cm}^2", "5"),
        (r"5\text{cm}", r"5\text{cm}"),
        (r"50\%", "50"),
        ("50%", "50%"),
        (".5", r"\frac{1}{2}"),
        (".25", "0.25"),
        ("x + .25", "x+0.25"),
        ("x^{.25}", "x^{0.25}"),
        ("x = 3", "3"),
        ("xy = 3", "xy=3"),
        ("xy=3", "3"),
        ("a=b=3", "a=b=3"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\sqrt{3}", r"\sqrt{3}"),
        (r"\sqrt 3", r"\sqrt{}3"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac172", r"\frac{1}{7}2"),
        (r"\frac{72}1", r"\frac{72}1"),
        ("3/4", r"\frac{3}{4}"),
        ("-3/4", r"\frac{-3}{4}"),
        ("03/4", "03/4"),
        ("a/b", "a/b"),
        ("1/2/3", "1/2/3"),
        ("1/2+1", "1/2+1"),
        ("0.5", r"\frac{1}{2}"),
        ("0.50", "0.50"),
        ("10.5", "10.5"),
        ("", ""),
        (r"1\text{ m } 5\text{ cm}", None),
        (r"\sqrt", None),
        (r"\sqrt\sqrt2", None),
        (r"\frac", None),
        (r"\frac1", None),
    ],
)
def test_a_rule_rewrites(text: str, expected: str | None):
    assert normalized(text) == expected


def test_both_sides_are_rewritten():
    assert math_string(prompt(answer=r"\dfrac34"), r"\boxed{ 3/4 }").correct


@pytest.mark.parametrize("answer, correct", [(r"\sqrt", True), (r"\sqrt ", False), ("2", False)])
def test_what_no_rule_fits_is_compared_as_it_was_written(answer: str, correct: bool):
    assert math_string(prompt(answer=r"\sqrt"), rf"\boxed{{{answer}}}").correct == correct


def test_a_right_answer_that_no_rule_fits_is_compared_as_it_was_written():
    gold = prompt(answer=r"1\text{ m } 5\text{ cm}")
    assert math_string(gold, r"\boxed{1\text{ m } 5\text{ cm}}").correct
    assert not math_string(gold, r"\boxed{1\text{ m } 6\text{ cm}}").correct


def test_it_says_of_every_pair_what_it_said_when_the_table_was_written():
    table = [(pair, said("math_string", pair)) for pair in pairs()]
    changed = [(p.gold, p.answer, verdict) for p, verdict in table if verdict != p.math_string]
    assert changed == []


def test_the_table_has_three_hundred_pairs_that_differ():
    table = [(pair.trap, pair.gold, pair.answer) for pair in pairs()]
    assert len(set(table)) == len(table) >= 300
    assert {pair.equal for pair in pairs()} == {"yes", "no"}

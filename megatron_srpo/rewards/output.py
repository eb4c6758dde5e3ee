"""Is what a program gave what it should have given?   the rules of LiveCodeBench's runner"""

from __future__ import annotations

import json
from decimal import Decimal, DecimalException


def same_text(given: str, expected: str) -> bool:
    r"""Line by line, without the white space around the whole and around each line. Two lines are
    the same if they are equal, or if both are numbers only, equal ones in the same order.

    >>> same_text("1.0  2\n\n", " 1 2.00"), same_text("1 2", "1\n2"), same_text("a  b", "a b")
    (True, False, False)
    """
    ours, theirs = given.strip().split("\n"), expected.strip().split("\n")
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def same_value(given: str, expected: str) -> bool:
    """Of JSON values, as Python compares them: 1 equals 1.0 and true. What is no JSON is wrong.

    A tuple has become a list on its way, also inside another value.
    """
    try:
        return json.loads(given) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


def _same_line(given: str, expected: str) -> bool:
    ours, theirs = given.split(), expected.split()
    if given.strip() == expected.strip():
        return True
    try:  # decimals: floats would take 50000000000000001 for 50000000000000000
        return [*map(Decimal, ours)] == [*map(Decimal, theirs)]
    except DecimalException:
        return False

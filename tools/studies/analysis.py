"""Curves -> areas, thresholds, paired differences, rates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tools.studies.store import Record


def area(xs: Sequence[float], ys: Sequence[float], end: float) -> float:
    """Mean height of the polygon through the points, from its first x to `end`.

    >>> area([0, 10, 20], [0.0, 1.0, 1.0], 20), area([0, 10, 20], [0.0, 1.0, 1.0], 5)
    (0.75, 0.25)
    """
    if xs[-1] < end:
        raise ValueError(f"a curve that ends at {xs[-1]} has no area until {end}")
    total = 0.0
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        if x0 >= end:
            break
        cut = min(x1, end)
        y_cut = y0 + (y1 - y0) * (cut - x0) / (x1 - x0)
        total += (cut - x0) * (y0 + y_cut) / 2
    return total / (end - xs[0])


def token_area(record: Record, budget: int) -> float:
    """Mean held-out pass@1 while the budget is spent."""
    return area(record.tokens, record.passed, budget)

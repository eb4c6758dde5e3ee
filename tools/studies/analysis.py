"""Curves -> areas, thresholds, paired differences, rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from scipy import stats

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


def step_area(record: Record, num_steps: int) -> float:
    """Mean held-out pass@1 over the first so many steps."""
    return area(record.step, record.passed, num_steps)


def at_end(record: Record, budget: int) -> float:
    """Held-out pass@1 where the budget is spent, between two evaluations.

    >>> between([0, 10], [0.0, 1.0], 5)
    0.5
    """
    return between(record.tokens, record.passed, budget)


def between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The polygon's height at `x`, which lies among `xs`."""
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise ValueError(f"{x} is behind the curve's end, {xs[-1]}")


def tokens_to(record: Record, threshold: float) -> float:
    """Tokens spent when the held-out pass@1 first reaches the threshold; infinity: never."""
    points = pairwise(zip(record.tokens, record.passed, strict=True))
    for (x0, y0), (x1, y1) in points:
        if y0 >= threshold:
            return x0
        if y1 >= threshold:
            return x0 + (threshold - y0) / (y1 - y0) * (x1 - x0)
    return math.inf


def median_ratio(baseline: Sequence[float], others: Sequence[float]) -> float | None:
    """Median of baseline / other over pairs; pairs of two infinities say nothing and are left out.

    >>> median_ratio([20.0, 30.0, math.inf, math.inf], [10.0, 30.0, 5.0, math.inf])
    2.0
    """
    pairs = [(a, b) for a, b in zip(baseline, others, strict=True) if min(a, b) < math.inf]
    ratios = [a / b for a, b in pairs]
    return median(ratios) if ratios else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two arms over paired seeds."""

    mean: float
    sd: float
    low: float
    """95 % interval by Student's t ..."""
    high: float
    wins: int
    num: int
    sign_p: float
    """Two-sided sign test, ties left out."""
    wilcoxon_p: float
    """Two-sided signed-rank test."""


def paired(left: Sequence[float], right: Sequence[float]) -> Difference | None:
    """left - right, of the same seeds; None of fewer than two pairs."""
    gaps = [a - b for a, b in zip(left, right, strict=True)]
    if len(gaps) < 2:
        return None
    mean, sd, num = fmean(gaps), stdev(gaps), len(gaps)
    reach = float(stats.t.ppf(0.975, num - 1)) * sd / math.sqrt(num)
    wins, losses = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    signed_rank: Any = stats.wilcoxon(gaps) if wins + losses else None
    return Difference(
        mean=mean,
        sd=sd,
        low=mean - reach,
        high=mean + reach,
        wins=wins,
        num=num,
        sign_p=float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        wilcoxon_p=float(signed_rank.pvalue) if signed_rank else 1.0,
    )


Strata = Mapping[str, Sequence[int]]
"""`Record.depth`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How often suffixes are right, by what they continue."""

    clean: float
    erroneous: float
    stratified: float
    """Clean minus erroneous at the same depth: a mean over depths, weighted as Mantel and Haenszel
    do, n1 n2 / (n1 + n2)."""


def correction(strata: Strata) -> Correction | None:
    """None without suffixes of both kinds, or where no depth has both."""
    rows = strata.values()
    clean, right_clean, erroneous, right_erroneous = (sum(row[i] for row in rows) for i in range(4))
    both = [row for row in rows if row[0] and row[2]]
    if not both:
        return None
    weights = [row[0] * row[2] / (row[0] + row[2]) for row in both]
    gaps = [row[1] / row[0] - row[3] / row[2] for row in both]
    return Correction(
        clean=right_clean / clean,
        erroneous=right_erroneous / erroneous,
        stratified=sum(w * g for w, g in zip(weights, gaps, strict=True)) / sum(weights),
    )


def merged(all_strata: Iterable[Strata]) -> dict[str, list[int]]:
    """Of several runs together."""
    total: dict[str, list[int]] = {}
    for strata in all_strata:
        for depth, row in strata.items():
            before = total.get(depth, [0] * 4)
            total[depth] = [a + b for a, b in zip(before, row, strict=True)]
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def thirds(values: Sequence[float | None]) -> list[float | None]:
    """Means over the first, second and last third of a run's intervals.

    >>> thirds([0.0, 1.0, 1.0, None, 0.5, 0.5])
    [0.5, 1.0, 0.5]
    """
    cuts = [round(len(values) * i / 3) for i in range(4)]
    parts = [[v for v in values[a:b] if v is not None] for a, b in pairwise(cuts)]
    return [fmean(part) if part else None for part in parts]

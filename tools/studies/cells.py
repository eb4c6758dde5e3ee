"""Numbers as cells of a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from tools.studies.analysis import Difference


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation; empty of nothing."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def shown(gap: Difference | None) -> str:
    """A paired difference; bold if its interval leaves out 0."""
    if gap is None:
        return ""
    bold = "**" if gap.low > 0 or gap.high < 0 else ""
    return f"{bold}{gap.mean:+.3f}{bold} [{gap.low:+.3f}, {gap.high:+.3f}], {gap.wins}/{gap.num}"


def thousands(tokens: float) -> str:
    """Tokens; infinity: never."""
    return "never" if tokens == math.inf else f"{tokens / 1000:.1f}k"


def mean(values: Sequence[float | None], digits: int = 2) -> str:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else ""

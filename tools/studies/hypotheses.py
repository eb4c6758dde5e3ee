"""Each claim, and the paired difference that would show it.   store -> table with verdicts"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.studies.analysis import Difference
from tools.studies.cells import shown, table
from tools.studies.comparison import pairs, runs_of, speed_up, token_difference
from tools.studies.regimes import REGIMES
from tools.studies.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """`left` has an AUC per token that is more than `margin` above `right`'s."""

    claim: str
    left: str
    right: str
    margin: float = 0.0


HYPOTHESES: Sequence[Hypothesis] = (
    Hypothesis(claim="SRPO is above RRPO (paper)", left="srpo", right="rrpo"),
    Hypothesis(claim="SRPO is above GRPO (paper)", left="srpo", right="grpo"),
    Hypothesis(claim="SRPO is above GRPO with half a baseline", left="srpo", right="half"),
    Hypothesis(claim="chain 2+6 is above GRPO", left="chain26", right="grpo"),
    Hypothesis(claim="chain 2+6 is above half a baseline", left="chain26", right="half"),
    Hypothesis(claim="... above its random resets", left="chain26", right="chain26 random"),
    Hypothesis(claim="... above itself, prefix masked", left="chain26", right="chain26 masked"),
    Hypothesis(claim="... no more than .02 below GRPO", left="chain26", right="grpo", margin=-0.02),
    Hypothesis(
        claim="chain 4+4 is no more than .02 below GRPO", left="chain", right="grpo", margin=-0.02
    ),
    Hypothesis(
        claim="chain 2+6 with half a baseline is above chain 2+6",
        left="chain26 half",
        right="chain26",
    ),
    Hypothesis(claim="... and above half a baseline", left="chain26 half", right="half"),
    Hypothesis(
        claim="chain 2+6 for dead prompts only is above half a baseline",
        left="chain26 dead",
        right="half",
    ),
    Hypothesis(claim="resets to the prompt are above GRPO (A/A)", left="prompt", right="grpo"),
)
FAST, SLOW, FACTOR = "chain26", "grpo", 2.0


def hypotheses_part(store: Store, seeds: range) -> str:
    """All claims in all regimes that have the runs."""
    rows: list[list[str]] = []
    for each in HYPOTHESES:
        claim = each.claim
        for name in REGIMES:
            by = runs_of((each.left, each.right), name, seeds, store)
            gap = token_difference(by, each.left, each.right, name)
            if gap is not None:
                rows.append([claim, name, shown(gap), verdict(gap, each.margin)])
                claim = ""
    rows += _speeds(store, seeds)
    header = ["claim", "regime", "difference in AUC per token", "so"]
    return f"## Hypotheses\n\n{EXPLAINED}\n{table(header, rows)}"


EXPLAINED = """\
Confirmed or refuted: the whole 95 % interval lies above or below what is claimed; open: it does
not. An A/A comparison should be open.
"""


def verdict(gap: Difference, margin: float) -> str:
    """The interval decides."""
    if gap.low > margin:
        return "confirmed"
    return "refuted" if gap.high < margin else "open"


def _speeds(store: Store, seeds: range) -> list[list[str]]:
    rows: list[list[str]] = []
    claim = "chain 2+6 needs half of a tuned GRPO's tokens"
    for name, regime in REGIMES.items():
        by, to = runs_of((FAST, SLOW), name, seeds, store), regime.thresholds[0]
        ratio, num = speed_up(by, FAST, SLOW, to), len(pairs(by, FAST, SLOW))
        if ratio is not None:
            found = f"to {to:.0%} GRPO needs {ratio:.2f} times its tokens (median of {num} pairs)"
            rows.append([claim, name, found, "yes" if ratio >= FACTOR else "no"])
            claim = ""
    return rows

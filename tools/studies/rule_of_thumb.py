"""Do gradients tell what a run will gain, and does the rule of thumb?   alignments, runs -> tables

The rule of thumb is `megatron_srpo.payoff`. Neither it nor the ratio of SNRs is fitted to anything,
but the rule was chosen when h8's gradients were known: the other regimes hold it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from scipy import stats

from tools.studies.alignment import (
    MEASURED,
    STATES,
    SURE,
    Alignment,
    Cell,
    Ratio,
    agreement,
    cell,
    relative,
)
from tools.studies.cells import table
from tools.studies.comparison import runs_of, speed_up, token_difference
from tools.studies.regimes import REGIMES
from tools.studies.store import Store
from tools.studies.table import TUNED

Known = Mapping[Cell, Alignment]
EXPLAINED = f"""\
Batches of every arm with about the same number of generated tokens (localization and draws in
search of seeds included), by the run's own rollouts, credit and backward pass; more batches of
{TUNED}, which is in all ratios. Nothing is updated, and there is no loss but the policy loss.
Cosine: of one batch's gradient with that of the pass rate, ± a standard error; a large sample of
other prompts stands for the latter, and cosines are corrected for its noise
(`tools/studies/alignment.py`). SNR: cos² / (1 - cos²) per token over {TUNED}'s, ×/÷ a standard
error; none where {TUNED}'s cosine is less than {SURE:.0f} standard errors above 0. Sum: cosine of
the sum of all batches, 1 but for bias and the noise that is left. Predicted: what the rule of thumb
(`megatron_srpo/payoff.py`) makes of the same rollouts.
"""
CHECKED = f"""\
### What predicts what

Over pairs of a regime and an arm other than {TUNED}; nothing is fitted, but the rule of thumb was
chosen when h8 was known: the other regimes hold it out. ρ: rank correlation. r:
correlation of logarithms; error: the factor by which a prediction is typically wrong (root mean
square of logarithms), and the median of measured / predicted; pairs that never reach the
threshold, and those without a gradient in the right direction, have no logarithm and are left out
of these two.
"""


def gradients_part(known: Known, store: Store, seeds: range) -> str:
    """Empty where nothing was measured."""
    tables = [
        f"### {name}\n\n{_origin(name, known)}\n{_of_regime(name, known)}"
        for name in REGIMES
        if any(each.regime == name for each in known)
    ]
    if not tables:
        return ""
    found = _checks(pairs(known, store, seeds))
    checks = [CHECKED, table(CHECK_HEADER, found)] if found else []
    return "\n".join(["## Gradients at equal tokens\n", EXPLAINED, *tables, *checks])


def _origin(regime: str, known: Known) -> str:
    """The policies and the references that stand for the truth."""
    some = {each.state: one for each, one in known.items() if each.regime == regime}
    return "".join(
        f"- {state}: pass@1 {one.passed:.2f}; reference worth {one.quality:.2f}, by a cosine of "
        f"{one.halves:.2f} between its halves (commit {one.commit}).\n"
        for state, one in some.items()
    )


def _of_regime(regime: str, known: Known) -> str:
    states = [state for state in STATES[regime] if cell(regime, state, TUNED) in known]
    header = ["arm"]
    for state in states:
        header += [f"{state}: cosine", "SNR", "sum", "predicted"]
    rows: list[list[str]] = []
    for arm in MEASURED:
        found = [known.get(cell(regime, state, arm)) for state in states]
        if any(found):
            bases = [known[cell(regime, state, TUNED)] for state in states]
            cells = [_cells(*pair) for pair in zip(found, bases, strict=True)]
            rows.append([arm, *(word for words in cells for word in words)])
    return table(header, rows)


def _cells(one: Alignment | None, baseline: Alignment) -> list[str]:
    if one is None:
        return [""] * 4
    ratio = relative(one, baseline) if one is not baseline else None
    return [
        f"{one.cosine:.3f} ± {one.error:.3f}",
        _factor(ratio) if ratio else "",
        f"{one.together / one.quality:.2f}",
        "" if one.predicted is None else f"{one.predicted:.2f}",
    ]


def _factor(ratio: Ratio) -> str:
    """A ratio and the factor of its standard error."""
    if not ratio.value:
        return "0"
    return f"{ratio.value:.2f} ×/÷ {math.exp(ratio.log_error):.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An arm in a regime, against the baseline there; None where it was not measured."""

    regime: str
    state: str
    snr: float
    rule: float | None
    """The rule of thumb's."""
    area: float | None
    """AUC per token, mean paired difference."""
    speed: float | None
    """Tokens of the baseline to the lower threshold, over the arm's: median."""


def pairs(known: Known, store: Store, seeds: range) -> list[Pair]:
    """Of all states; those without a ratio of SNRs are left out."""
    found: list[Pair] = []
    for regime in REGIMES:
        by = runs_of(MEASURED, regime, seeds, store)
        for state, arm in product(STATES[regime], MEASURED):
            one, baseline = (known.get(cell(regime, state, name)) for name in (arm, TUNED))
            if one is None or baseline is None or one is baseline:
                continue
            if (ratio := relative(one, baseline)) is None:
                continue
            gap = token_difference(by, arm, TUNED, regime)
            found.append(
                Pair(
                    regime=regime,
                    state=state,
                    snr=ratio.value,
                    rule=one.predicted,
                    area=gap.mean if gap else None,
                    speed=speed_up(by, arm, TUNED, REGIMES[regime].thresholds[0]),
                )
            )
    return found


CHOSEN_ON = "h8"
"""The rule of thumb was chosen when this regime's gradients were known."""
CHECK_HEADER = [
    *("policy", "regimes", "prediction", "of", "ρ", "pairs"),
    *("r", "error", "median", "pairs"),
]
SPEED, RULE = "tokens to the threshold", "rule of thumb"
Points = Sequence[tuple[float, float]]
"""(predicted, measured)"""


def _checks(found: Sequence[Pair]) -> list[list[str]]:
    rows: list[list[str]] = []
    for part in dict.fromkeys(map(_part, found)):
        own = [each for each in found if _part(each) == part]
        head = [own[0].state, ", ".join(dict.fromkeys(each.regime for each in own))]
        areas = [(p.snr, p.area) for p in own if p.area is not None]
        rows.append([*head, "SNR", "difference in AUC per token", *_ranks(areas), *[""] * 4])
        speeds = [(p.snr, p.speed) for p in own if p.speed is not None]
        ruled = [(p.rule, p) for p in own if p.rule is not None]
        ratios = [(rule, p.snr) for rule, p in ruled]
        ends = [(rule, p.speed) for rule, p in ruled if p.speed is not None]
        for prediction, measured, points in (
            ("SNR", SPEED, speeds),
            (RULE, "SNR", ratios),
            (RULE, SPEED, ends),
        ):
            rows.append([*head, prediction, measured, *_ranks(points), *_logs(points)])
    return rows


def _part(pair: Pair) -> tuple[str, bool]:
    """What a row is of: a policy, in the regime that chose the rule or in the others."""
    return pair.state, pair.regime == CHOSEN_ON


def _ranks(points: Points) -> list[str]:
    """Spearman's correlation, none of fewer than three points or of equal ones; how many."""
    predicted, measured = [point[0] for point in points], [point[1] for point in points]
    if len(points) < 3 or len({*predicted}) == 1 or len({*measured}) == 1:
        return ["", str(len(points))]
    found: Any = stats.spearmanr(predicted, measured)
    return [f"{found.statistic:.2f}", str(len(points))]


def _logs(points: Points) -> list[str]:
    if (found := agreement(points)) is None:
        return [""] * 4
    numbers = [f"{found.correlation:.2f}", f"×/÷ {found.factor:.2f}", f"{found.bias:.2f}"]
    return [*numbers, str(found.num)]

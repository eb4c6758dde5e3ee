"""How does each arm of a study fare against its baseline?   records -> table"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from tools.studies.analysis import (
    Difference,
    at_end,
    median_ratio,
    paired,
    step_area,
    token_area,
    tokens_to,
)
from tools.studies.cells import shown, spread, table, thousands
from tools.studies.plan import best_lr, job
from tools.studies.regimes import REGIMES, Regime
from tools.studies.store import Record, Store

By = Mapping[str, Mapping[int, Record]]
"""arm -> seed -> its run"""


def runs_of(
    arms: Sequence[str], regime: str, seeds: range, store: Store, lr: str | None = None
) -> By:
    """Those that are there; no entry for an arm without any. `lr`: instead of the tuned one."""
    rate = lr or best_lr(regime, store)
    found: dict[str, dict[int, Record]] = {}
    for arm in arms if rate else ():
        for seed in seeds:
            if record := store.get(job(regime, arm, str(rate), seed)):
                found.setdefault(arm, {})[seed] = record
    return found


def pairs(by: By, left: str, right: str) -> list[tuple[Record, Record]]:
    """Of the seeds that both arms have."""
    both = by.get(left, {}).keys() & by.get(right, {}).keys()
    return [(by[left][seed], by[right][seed]) for seed in sorted(both)]


def token_difference(by: By, left: str, right: str, regime: str) -> Difference | None:
    """In AUC per token."""
    budget, both = REGIMES[regime].budget, pairs(by, left, right)
    return paired(*([token_area(pair[i], budget) for pair in both] for i in (0, 1)))


def speed_up(by: By, arm: str, baseline: str, threshold: float) -> float | None:
    """Median over pairs of how many times the arm's tokens the baseline needs to get there."""
    both = pairs(by, baseline, arm)
    return median_ratio(*([tokens_to(pair[i], threshold) for pair in both] for i in (0, 1)))


def common_steps(by: By) -> int:
    """So many as every run has made."""
    return min(record.step[-1] for runs in by.values() for record in runs.values())


def comparison(by: By, baseline: str, regime: Regime) -> str:
    """One row an arm; equal tokens and equal steps side by side."""
    num_steps, (low, high) = common_steps(by), regime.thresholds
    header = [
        *("arm", "seeds", "AUC per token", f"- {baseline}", "p"),
        *(f"AUC per step, {num_steps}", f"- {baseline}", "end"),
        *(f"tokens to {low:.0%}", f"to {high:.0%}", f"{baseline}'s / its", "steps"),
    ]
    return table(header, [_row(by, arm, baseline, regime, num_steps) for arm in by])


def _row(by: By, arm: str, baseline: str, regime: Regime, num_steps: int) -> list[str]:
    records, budget, (low, high) = [*by[arm].values()], regime.budget, regime.thresholds
    against: list[str] = ["", "", "", ""]
    if arm != baseline:
        both, ratio = pairs(by, arm, baseline), speed_up(by, arm, baseline, low)
        per_token = token_difference(by, arm, baseline, regime.name)
        per_step = paired(*([step_area(pair[i], num_steps) for pair in both] for i in (0, 1)))
        p = f"{per_token.sign_p:.2g}, {per_token.wilcoxon_p:.2g}" if per_token else ""
        against = [shown(per_token), p, shown(per_step), f"{ratio:.2f}" if ratio else ""]
    steps = [record.step[-1] * budget / record.tokens[-1] for record in records]
    return [
        *(arm, str(len(records)), spread([token_area(r, budget) for r in records]), *against[:2]),
        *(spread([step_area(r, num_steps) for r in records]), against[2]),
        spread([at_end(r, budget) for r in records]),
        *(thousands(median(tokens_to(r, t) for r in records)) for t in (low, high)),
        *(against[3], f"{fmean(steps):.0f}"),
    ]

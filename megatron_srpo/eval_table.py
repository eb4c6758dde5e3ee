"""What did an evaluation find?   attempts -> a row per set: means, and how sure they are

Two things are uncertain in a mean over problems, and each has its own number:

    <metric>_ci95    half of a 95 % interval over seeds (Student's t): what other draws of the same
                     policy on the same problems would give; from `eval.num_seeds` 2 on
    <metric>_stderr  standard error over problems: what other problems of the same kind would give

The last row, with several sets, is the mean over sets; its interval is over seeds, too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from megatron_srpo.config import Config
from megatron_srpo.evaluate import Attempt, Chances, all_chances, attempt_sums
from megatron_srpo.metrics import combine

MEAN = "mean"
"""The last row's name."""
DIGITS = {"num_problems": 0, "num_responses": 0, "response_tokens_mean": 1}
"""Behind the point, for people; 3 otherwise."""


def table(attempts: Sequence[Attempt], cfg: Config) -> pd.DataFrame:
    """Index: set. Columns: `num_problems`, `num_responses`, and the metrics of
    `evaluate.attempt_sums` with what is known of their accuracy; NaN where there is none."""
    metrics = combine([attempt_sums(attempts, cfg)])
    rows: dict[str, dict[str, float]] = {}
    by_seed: dict[str, list[Mapping[int, float]]] = defaultdict(list)
    for name in cfg.eval.sets:
        of_set = [attempt for attempt in attempts if attempt.set == name]
        prefix = f"eval/{name}/"
        row = {"num_problems": len({a.prompt_id for a in of_set}), "num_responses": len(of_set)}
        known = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
        for metric, chances in all_chances(of_set, cfg).items():
            seeds = _of_seeds(chances)
            by_seed[metric].append(seeds)
            row |= {metric: known.pop(metric, nan), **_accuracy(metric, seeds, chances)}
        rows[name] = row | known
    if len(rows) > 1:
        rows[MEAN] = _mean_row(rows, by_seed)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("set")


def interval(means: Sequence[float]) -> float:
    """Half of the 95 % interval of what these independent means estimate; NaN of fewer than two."""
    if len(means) < 2:
        return nan
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    return float(student.ppf(0.975, len(means) - 1) * error)


def _of_seeds(chances: Chances) -> dict[int, float]:
    """seed -> mean over problems"""
    values: dict[int, list[float]] = defaultdict(list)
    for (_, seed), chance in chances.items():
        values[seed].append(chance)
    return {seed: float(np.mean(each)) for seed, each in values.items()}


def _accuracy(metric: str, seeds: Mapping[int, float], chances: Chances) -> dict[str, float]:
    problems: dict[str, list[float]] = defaultdict(list)
    for (problem, _), chance in chances.items():
        problems[problem].append(chance)
    means = [np.mean(each) for each in problems.values()]
    found = {}
    if len(means) > 1:
        found[f"{metric}_stderr"] = float(np.std(means, ddof=1) / np.sqrt(len(means)))
    if len(seeds) > 1:
        found[f"{metric}_ci95"] = interval([*seeds.values()])
    return found


def _mean_row(
    rows: Mapping[str, Mapping[str, float]], by_seed: Mapping[str, Sequence[Mapping[int, float]]]
) -> dict[str, float]:
    """Of every metric that all sets have."""
    row: dict[str, float] = {
        name: sum(each[name] for each in rows.values())
        for name in ("num_problems", "num_responses")
    }
    for metric, of_sets in by_seed.items():
        if all(of_sets):
            row[metric] = float(np.mean([each[metric] for each in rows.values()]))
            seeds = set.intersection(*(set(seeds) for seeds in of_sets))
            means = [float(np.mean([seeds[s] for seeds in of_sets])) for s in sorted(seeds)]
            if len(means) > 1:
                row[f"{metric}_ci95"] = interval(means)
    return row


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """For people: text, an accuracy beside what it is of: mean ± interval (standard error)."""
    rows = found.to_dict(orient="records")
    columns = {"set": [str(name) for name in found.index]}
    for name in found.columns:
        if not name.endswith(("_ci95", "_stderr")):
            digits = DIGITS.get(name, 3)
            columns[_title(name)] = [_cell(row, name, digits) for row in rows]
    return pd.DataFrame(columns)


def _title(name: str) -> str:
    """
    >>> [_title(name) for name in ("num_problems", "pass_at_8", "truncated_rate")]
    ['problems', 'pass@8', 'truncated']
    """
    for begin in ("num_", "response_"):
        name = name.removeprefix(begin)
    return name.removesuffix("_rate").removesuffix("_mean").replace("pass_at_", "pass@")


def _cell(row: Mapping[str, float], name: str, digits: int) -> str:
    value, ci95, stderr = (row.get(name + end, nan) for end in ("", "_ci95", "_stderr"))
    if isnan(value):
        return "-"
    words = [f"{value:.{digits}f}"]
    if not isnan(ci95):
        words.append(f"± {ci95:.{digits}f}")
    if not isnan(stderr):
        words.append(f"({stderr:.{digits}f})")
    return " ".join(words)


def write_tables(found: pd.DataFrame, folder: Path) -> None:
    """table.json, table.csv: all numbers; table.tex: as it is shown."""
    known = {name: row.dropna().to_dict() for name, row in found.iterrows()}
    (folder / "table.json").write_text(json.dumps(known, indent=2) + "\n", "utf-8")
    found.to_csv(folder / "table.csv")
    # `escape`: names hold underscores.
    tex = shown(found).to_latex(index=False, escape=True)
    (folder / "table.tex").write_text(tex, "utf-8")

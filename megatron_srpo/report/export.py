"""How does a report enter a paper or a notebook?   report -> PNG, SVG and CSV files

Charts are those of the page. matplotlib is imported here alone, when it is asked for.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srpo.report.charts import Chart, Lines
from megatron_srpo.report.page import Report
from megatron_srpo.report.record import RunRecord, read_groups
from megatron_srpo.report.summary import summary
from megatron_srpo.report.tree import Branch, trees
from megatron_srpo.staging import staged_folder

DASHES = ("-", "--", ":", "-.")
ROLLOUT = (
    "run", "step", "prompt", "rollout", "use", "seed", "reward", "correct", "failure", "tokens",
    "copied_tokens", "thoughts", "finish_reason", "advantage", "blamed_thought", "reset_cause",
)  # fmt: skip
"""Columns of rollouts.csv; thoughts count from 1."""
Cells = Sequence[Any]


def export(report: Report, out: Path) -> None:
    """A new folder: `<chart>.png`, `.svg` and `.csv` of every chart, and `summary.csv`,
    `metrics.csv` (a row a step) and `rollouts.csv` (a row a rollout, all of the journal)."""
    with staged_folder(out) as folder:
        for chart in report.charts:
            _draw(chart, folder)
            _write(folder / f"{chart.id}.csv", _rows(chart))
        _write(
            folder / "summary.csv", [[name, *values] for name, values in summary(report.measured)]
        )
        _write(folder / "metrics.csv", _metrics(report))
        runs = [measured.run for measured in report.measured]
        _write(folder / "rollouts.csv", _rollouts(runs))


def _write(path: Path, rows: Iterable[Cells]) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file).writerows(rows)


def _draw(chart: Chart, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    order = 0
    for number, lines in enumerate(chart.sets):
        axis, x = next((axis, np.array(values, float)) for axis, values in lines.x.items())
        named = [_named(chart, lines, line.name) for line in lines.lines]
        values = [np.array(line.mean, float) for line in lines.lines]  # None is nan
        if chart.kind == "stack":
            axes.stackplot(x, np.nan_to_num(values), labels=named, alpha=0.7)
        for line, name, mean in zip(lines.lines, named, values, strict=True):
            colour = f"C{order % 10}"
            if chart.kind == "bars":
                width = 0.09 / len(chart.sets)
                left = x + (number - (len(chart.sets) - 1) / 2) * width
                axes.bar(left, mean, width, label=name, color=colour)
            elif chart.kind == "lines":
                axes.plot(
                    x,
                    mean,
                    DASHES[order % len(DASHES)],
                    label=name,
                    color=colour,
                    marker="." * (len(x) <= 40),
                )
            if line.deviation:
                band = np.array(line.deviation, float)
                axes.fill_between(x, mean - band, mean + band, color=colour, alpha=0.2)
            order += 1
        axes.set_xlabel(axis)
    axes.set_title(chart.title)
    axes.set_ylabel(chart.unit)
    axes.legend(fontsize="x-small")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{chart.id}.{kind}", dpi=150)


def _named(chart: Chart, lines: Lines, name: str) -> str:
    return f"{lines.experiment}: {name}" if len(chart.sets) > 1 else name


def _rows(chart: Chart) -> Iterable[Cells]:
    """Long: a row for every point of every line."""
    axes = [*chart.sets[0].x]
    yield ["experiment", "line", *axes, "mean", "standard_deviation"]
    for lines in chart.sets:
        for line in lines.lines:
            for at, mean in enumerate(line.mean):
                place = [lines.x[axis][at] for axis in axes]
                yield [lines.experiment, line.name, *place, mean, *line.deviation[at : at + 1]]


def _metrics(report: Report) -> Iterable[Cells]:
    names = sorted({n for each in report.measured for row in each.rows for n in row} - {"step"})
    yield ["run", "step", *names]
    for measured in report.measured:
        for row in measured.rows:
            yield [measured.run.name, int(row["step"]), *(row.get(name) for name in names)]


def _rollouts(runs: Sequence[RunRecord]) -> Iterable[Cells]:
    yield ROLLOUT
    recorded = [(run, step) for run in runs for step in run.steps]
    for run, step in recorded:
        for tree in trees(read_groups(run, step)[0], run.cfg):
            for branch in tree.all:
                yield [run.name, step, tree.prompt.id, *_cells(branch)]


def _cells(branch: Branch) -> Cells:
    rollout, reset = branch.rollout, branch.reset
    blamed = None
    if reset is not None and reset.thought is not None:
        blamed = 1 + (reset.thought if reset.moved_from is None else reset.moved_from)
    return [
        rollout.id,
        branch.group.use,
        rollout.seed_id,
        rollout.score.value,
        int(rollout.score.correct),
        rollout.score.failure,
        len(rollout.token_ids),
        rollout.num_copied,
        len(rollout.thoughts),
        rollout.finish_reason,
        branch.credit[-1][2] if branch.credit else None,
        blamed,
        reset.cause if reset is not None else None,
    ]

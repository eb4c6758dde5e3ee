"""Learning curves of a regime, over tokens and over steps.   records by arm -> PNG and SVG"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

from tools.studies.store import Record

NUM_POINTS = 60
SIZE, DPI = (9.0, 3.8), 100


def draw_curves(
    arms: Mapping[str, Sequence[Record]], out: Path, *, title: str, budget: int, num_steps: int
) -> None:
    """Means over seeds, with bands of one standard error; writes `out`.png and `out`.svg."""
    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (arm, records) in enumerate(arms.items()):
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--"}
        for axes, name, end in ((left, "tokens", budget), (right, "step", num_steps)):
            xs = np.linspace(0, end, NUM_POINTS)
            ys = np.array([np.interp(xs, getattr(r, name), r.passed) for r in records])
            error = ys.std(axis=0, ddof=1) / np.sqrt(len(ys)) if len(ys) > 1 else 0 * xs
            axes.plot(xs, ys.mean(axis=0), label=f"{arm} ({len(records)})", **style)
            axes.fill_between(xs, ys.mean(0) - error, ys.mean(0) + error, alpha=0.15, lw=0, **style)
    left.set_xlabel("generated tokens, all kinds")
    right.set_xlabel("steps")
    left.set_ylabel("held-out pass@1")
    left.set_title(title, loc="left", fontsize="medium")
    right.legend(fontsize="x-small", ncols=2)
    _save(figure, out)


def draw_dial(
    points: Mapping[float, Sequence[float]], out: Path, *, lines: Mapping[str, float]
) -> None:
    """Areas over how often the localizer is right; `lines`: arms that have no dial."""
    figure = Figure(figsize=(5.0, 3.6), layout="constrained")
    axes = figure.subplots()
    xs = sorted(points)
    means = [float(np.mean(points[x])) for x in xs]
    errors = [float(np.std(points[x], ddof=1) / np.sqrt(len(points[x]))) for x in xs]
    axes.errorbar(xs, means, errors, marker="o", capsize=3, label="dial")
    for index, (name, value) in enumerate(lines.items(), 1):
        axes.axhline(value, color=f"C{index}", linestyle="--", label=name)
    axes.set_xlabel("probability that the localizer is right, else random")
    axes.set_ylabel("mean held-out pass@1 over the budget")
    axes.legend(fontsize="x-small")
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    rcParams["svg.hashsalt"] = out.name  # the same numbers make the same file
    figure.savefig(out.with_suffix(".png"), dpi=DPI, metadata={"Software": None})
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})

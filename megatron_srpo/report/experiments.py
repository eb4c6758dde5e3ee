"""Which runs are seeds of one experiment?   records, facts -> experiments, means and bands

Runs belong together if their configs differ in the seed, and in what changes no result, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_srpo.metrics import GENERATED
from megatron_srpo.report.facts import Depths
from megatron_srpo.report.record import RunRecord
from megatron_srpo.resume import decisive_fields

MOST_POINTS = 2000
"""Of a curve; of longer ones every second, third, ... is shown."""
Row = dict[str, float]
Curve = tuple[tuple[float | None, ...], tuple[float | None, ...]]
"""Means, and standard deviations over seeds (none where there is one seed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run and what its rollouts say."""

    run: RunRecord
    rows: tuple[Row, ...]
    """Metrics by step, with what the rollouts add."""
    depths: Depths


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Runs that differ in the seed alone."""

    name: str
    runs: tuple[Measured, ...]

    @property
    def steps(self) -> list[int]:
        steps = sorted({int(row["step"]) for run in self.runs for row in run.rows})
        return steps[:: -(-len(steps) // MOST_POINTS) or 1]

    def axes(self) -> dict[str, list[float | None]]:
        """Where the points of a curve stand: by steps, tokens generated and hours until then, the
        mean over runs."""
        spent = [_spent(run.rows) for run in self.runs]
        axes: dict[str, list[float | None]] = {"step": [float(step) for step in self.steps]}
        for name in ("tokens", "hours"):
            axes[name] = [_mean([s[step][name] for s in spent if step in s]) for step in self.steps]
        return axes

    def curve(self, metric: str) -> Curve | None:
        """Over steps; None if no run has it."""
        by_step = [{int(row["step"]): row.get(metric) for row in run.rows} for run in self.runs]
        points = [[v for run in by_step if (v := run.get(step)) is not None] for step in self.steps]
        if not any(points):
            return None
        deviations = (float(np.std(p, ddof=1)) if len(p) > 1 else None for p in points)
        return tuple(map(_mean, points)), tuple(deviations)

    def depths(self) -> Depths:
        """Of all seeds."""
        total = Depths.none()
        for run in self.runs:
            total += run.depths
        return total


def experiments(runs: Sequence[Measured]) -> list[Experiment]:
    """In the order in which they are named; called by what their configs differ in."""
    fields = [_fields(measured.run) for measured in runs]
    together: dict[tuple[tuple[str, str], ...], list[Measured]] = {}
    for own, measured in zip(fields, runs, strict=True):
        together.setdefault(tuple(sorted(own.items())), []).append(measured)
    keys = [dict(key) for key in together]
    names = {name for key in keys for name in key}
    differing = sorted(n for n in names if len({key.get(n) for key in keys}) > 1)
    return [
        Experiment(name=_name(dict(key), differing, members), runs=tuple(members))
        for key, members in together.items()
    ]


def _name(key: dict[str, str], differing: list[str], members: list[Measured]) -> str:
    seeds = f", {len(members)} seeds" if len(members) > 1 else ""
    is_telling = 0 < len(differing) <= 3 and all(name in key for name in differing)
    if is_telling:
        return " ".join(f"{n.rpartition('.')[2]}={key[n]}" for n in differing) + seeds
    return members[0].run.name + seeds


def _fields(run: RunRecord) -> dict[str, str]:
    """What decides the result, as texts; of a run without a config, itself."""
    if run.cfg is None:
        return {"run": run.name}
    fields: dict[str, Any] = decisive_fields(run.cfg)
    return {name: str(value) for name, value in fields.items() if name != "seed"}


def _spent(rows: Sequence[Row]) -> dict[int, Row]:
    """By step, what had been spent before it; gaps in the record are counted as nothing."""
    spent: dict[int, Row] = {}
    tokens = hours = 0.0
    for row in rows:
        spent[int(row["step"])] = {"tokens": tokens, "hours": hours}
        tokens += sum(row.get(name, 0.0) for name in GENERATED)
        hours += row.get("time/step_s", 0.0) / 3600
    return spent


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None

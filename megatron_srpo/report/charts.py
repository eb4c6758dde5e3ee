"""What is drawn?   experiments -> charts, as plain values

The page, the pictures and the tables of `--export` all draw these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_srpo.metrics import GENERATED
from megatron_srpo.report.experiments import Experiment
from megatron_srpo.report.facts import NUM_BINS

Values = tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    mean: Values
    deviation: Values = ()
    """Standard deviation over seeds; nothing where there is no band."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Of one experiment, on axes of their own."""

    experiment: str
    x: dict[str, list[float | None]]
    """Axis -> where the points stand."""
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    section: str
    title: str
    unit: str
    kind: Literal["lines", "stack", "bars"]
    sets: tuple[Lines, ...]

    @property
    def id(self) -> str:
        """As a file name."""
        words = "".join(c if c.isalnum() else " " for c in f"{self.section} {self.title}".lower())
        return "_".join(words.split())


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart over steps: what it shows of each experiment that has any of it."""

    section: str
    title: str
    unit: str
    metrics: dict[str, str]
    """Metric -> the line's name."""
    kind: Literal["lines", "stack"] = "lines"


PLOTS = (
    Plot("Learning", "Reward", "reward", {"reward/mean": "mean"}),
    Plot("Learning", "Pass rate of rollouts", "share",
         {"pass_rate/base": "from the prompt", "pass_rate/suffix": "from a reset"}),
    Plot("Resets", "Failed rollouts corrected", "share of suffixes",
         {"reset/clean_corrected_rate": "reset at or before the first error",
          "reset/erroneous_corrected_rate": "reset behind it"}),
    Plot("Resets", "Localization against the known first error", "share of resets",
         {"localize/exact_rate": "exactly there", "localize/clean_rate": "there or before"}),
    Plot("Resets", "Groups without signal", "share",
         {"group/zero_signal_rate": "all rewards equal", "group/redrawn_rate": "drawn anew"}),
    Plot("Resets", "Depth of resets", "share of the chain", {"reset/depth_frac_mean": "mean"}),
    Plot("Resets", "What resets came to", "share",
         {"reset/seed_found_rate": "failed rollout found", "reset/skipped_rate": "skipped",
          "reset/empty_prefix_rate": "back to the prompt", "reset/moved_rate": "moved"}),
    Plot("Health", "Trainer against rollout engine", "nats",
         {"mismatch/logprob_abs_max": "largest difference",
          "mismatch/logprob_abs_mean": "mean difference",
          "sync/probe_logprob_abs_max": "probe after the sync"}),
    Plot("Health", "Entropy", "nats", {"entropy": "of a token"}),
    Plot("Health", "Gradient norm", "before clipping", {"grad_norm": "gradient"}),
    Plot("Health", "Loss", "", {"loss": "policy", "loss/demonstrations": "retention"}),
    Plot("Health", "Response length", "tokens",
         {"response/tokens_pass": "right", "response/tokens_fail": "wrong",
          "response/tokens_max": "longest"}),
    Plot("Health", "Thoughts", "in a response", {"thought/num_mean": "mean"}),
    Plot("Health", "Cut and unreadable", "share",
         {"rollout/truncated_rate": "response cut by length", "thought/cut_rate": "thought cut",
          "localize/parse_failed_rate": "localization not parsed",
          "localize/no_error_rate": "localization found no error",
          "localize/too_long_rate": "localization too long",
          "reward/failure_rate": "reward failed"}),
    Plot("Health", "Rewards that agree", "share", {"reward/agreement": "with the second reward"}),
    Plot("Cost", "Generated tokens", "tokens a step",
         {name: name.rpartition("/")[2] for name in GENERATED}, "stack"),
    Plot("Cost", "Speed", "generated tokens / s", {"speed/tokens_per_s": "whole step"}),
)  # fmt: skip
SECTIONS = ("Learning", "Resets", "Health", "Cost", "Other")


def charts(experiments: Sequence[Experiment]) -> list[Chart]:
    """All that the runs have values for, by section; metrics that no plot names come last."""
    metrics = sorted({n for e in experiments for run in e.runs for row in run.rows for n in row})
    plots = [*PLOTS, *_evaluations(metrics), *_phases(metrics)]
    named = {metric for plot in plots for metric in plot.metrics} | {"time/step_s", "step"}
    others = [metric for metric in metrics if metric not in named]
    plots += [Plot("Other", name, "", {name: name}) for name in others]
    drawn = [chart for plot in plots for chart in _over_steps(plot, experiments)]
    drawn += _by_depth(experiments)
    return sorted(drawn, key=lambda chart: SECTIONS.index(chart.section))


def _evaluations(metrics: Sequence[str]) -> list[Plot]:
    """A plot for each set, of what was right in it."""
    by_set: dict[str, dict[str, str]] = {}
    for name in metrics:
        if is_accuracy(name):
            _, set_name, measure = name.split("/")
            by_set.setdefault(set_name, {})[name] = measure.replace("pass_at_", "pass@")
    return [Plot("Learning", f"Evaluation: {name}", "share", by_set[name]) for name in by_set]


def is_accuracy(metric: str) -> bool:
    """A share of right responses in an evaluation."""
    parts = metric.split("/")
    return len(parts) == 3 and parts[0] == "eval" and parts[2].startswith(("pass_at_", "greedy"))


def _phases(metrics: Sequence[str]) -> list[Plot]:
    """Time and memory: which phases there are, the metrics say."""
    times = {n: n[5:-2] for n in metrics if n.startswith("time/") and n != "time/step_s"}
    memory = {
        n: n[7:].removesuffix("_gib").removesuffix("_peak")
        for n in metrics
        if n.startswith("memory/")
    }
    return [
        Plot("Cost", "Time by phase", "s a step", times, "stack"),
        Plot("Cost", "Memory", "GiB, first rank", memory),
    ]


def _over_steps(plot: Plot, experiments: Sequence[Experiment]) -> list[Chart]:
    """One chart; a stack is one of each experiment, since areas hide each other. What is 0
    throughout is drawn only where all is."""
    rows = [row for e in experiments for run in e.runs for row in run.rows]
    telling = {name for name in plot.metrics if any(row.get(name) for row in rows)}
    is_banded = plot.kind == "lines"
    sets: list[Lines] = []
    for experiment in experiments:
        shown = {n: label for n, label in plot.metrics.items() if n in telling or not telling}
        found = {label: experiment.curve(name) for name, label in shown.items()}
        curves = {label: curve for label, curve in found.items() if curve}
        lines = [
            Line(
                name=label, mean=curve[0], deviation=curve[1] if is_banded and any(curve[1]) else ()
            )
            for label, curve in curves.items()
            if curve
        ]
        if lines:
            own = Lines(experiment=experiment.name, x=experiment.axes(), lines=tuple(lines))
            sets.append(_without_gaps(own))
    if plot.kind == "stack" and len(sets) > 1:
        return [_chart(plot, [own], f"{plot.title}: {own.experiment}") for own in sets]
    return [_chart(plot, sets, plot.title)] if sets else []


def _without_gaps(lines: Lines) -> Lines:
    """Where no line has a value, there is no point: evaluations are not of every step."""
    places = [i for i, means in enumerate(zip(*(line.mean for line in lines.lines), strict=True))
              if any(mean is not None for mean in means)]  # fmt: skip

    def kept(values: Sequence[float | None]) -> Values:
        return tuple(values[i] for i in places) if values else ()

    return Lines(
        experiment=lines.experiment,
        x={axis: [*kept(values)] for axis, values in lines.x.items()},
        lines=tuple(
            Line(name=line.name, mean=kept(line.mean), deviation=kept(line.deviation))
            for line in lines.lines
        ),
    )


def _chart(plot: Plot, sets: Sequence[Lines], title: str) -> Chart:
    return Chart(
        section=plot.section, title=title, unit=plot.unit, kind=plot.kind, sets=tuple(sets)
    )


def _by_depth(experiments: Sequence[Experiment]) -> list[Chart]:
    """Where in the chain resets go, and how often a suffix from there is right."""
    where: list[Lines] = []
    corrected: list[Lines] = []
    x: dict[str, list[float | None]] = {"depth": [(i + 0.5) / NUM_BINS for i in range(NUM_BINS)]}
    for experiment in experiments:
        counts = experiment.depths()
        if not counts.resets.sum():
            continue
        shares = counts.resets / counts.resets.sum()
        rates = [
            float(right / all) if all else None
            for right, all in zip(counts.corrected, counts.suffixes, strict=True)
        ]
        for sets, name, values in (
            (where, "resets", tuple(map(float, shares))),
            (corrected, "suffixes that are right", tuple(rates)),
        ):
            line = Line(name=name, mean=values)
            sets.append(Lines(experiment=experiment.name, x=x, lines=(line,)))
    drawn = [("Where in the chain", "share of resets", where)]
    drawn.append(("Corrected, by depth of the reset", "share of suffixes", corrected))
    return [
        Chart(section="Resets", title=title, unit=unit, kind="bars", sets=tuple(sets))
        for title, unit, sets in drawn
        if sets
    ]

"""What, where, at what cost, to what effect?   measured runs -> a table, a column a run"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_srpo.config import Config
from megatron_srpo.metrics import GENERATED
from megatron_srpo.payoff import verdict
from megatron_srpo.report.charts import is_accuracy
from megatron_srpo.report.experiments import Measured

METHODS = {"none": "GRPO", "random": "RRPO", "self": "SRPO"}
UNKNOWN = "not known"
Table = list[tuple[str, list[str]]]
"""Rows: what it is, and each run's."""
SETTINGS: dict[str, Callable[[Config], str]] = {
    "method": lambda c: f"{METHODS.get(c.algorithm.resets, 'resets')} ({c.algorithm.resets})",
    "policy": lambda c: str(c.model),
    "data": lambda c: str(c.data.train),
    "reward": lambda c: c.reward,
    "a step": lambda c: f"{c.algorithm.num_prompts} prompts x {c.algorithm.num_rollouts} rollouts",
    "layout": lambda c: (
        f"tp {c.parallel.tp}, pp {c.parallel.pp}, cp {c.parallel.cp}, ep {c.parallel.ep}; "
        f"rollouts tp {c.rollout.tp}; {c.dtype}"
    ),
    "seed": lambda c: str(c.seed),
}


def summary(runs: Sequence[Measured]) -> Table:
    """Rows that say nothing of any run are left out."""
    table: Table = [("run", [measured.run.name for measured in runs])]
    table.append(("state", [measured.run.state for measured in runs]))
    table.append(("folder", [str(measured.run.folder.root.resolve()) for measured in runs]))
    for name, setting in SETTINGS.items():
        cfgs = [measured.run.cfg for measured in runs]
        table.append((name, [setting(cfg) if cfg else UNKNOWN for cfg in cfgs]))
    table.append(("steps", [_steps(measured) for measured in runs]))
    table.append(("generated tokens", [_generated(measured) for measured in runs]))
    table.append(("time", [_time(measured) for measured in runs]))
    accuracies = {name for each in runs for row in each.rows for name in row if is_accuracy(name)}
    for metric in [*sorted(accuracies), "pass_rate/base", "reward/mean"]:
        table.append((_called(metric), [_from_to(measured, metric) for measured in runs]))
    table.append(("resets", [verdict(measured.rows) or UNKNOWN for measured in runs]))
    return [(name, values) for name, values in table if {*values} - {UNKNOWN}]


def _called(metric: str) -> str:
    if not is_accuracy(metric):
        return {"pass_rate/base": "pass rate of rollouts", "reward/mean": "reward"}[metric]
    _, name, measure = metric.split("/")
    return f"{name} {measure.replace('pass_at_', 'pass@')}"


def _steps(measured: Measured) -> str:
    cfg = measured.run.cfg
    done = sum("loss" in row or "time/step_s" in row for row in measured.rows)
    return f"{done} of {cfg.num_steps}" if cfg else f"{done}"


def _generated(measured: Measured) -> str:
    total = sum(row.get(name, 0.0) for row in measured.rows for name in GENERATED)
    return f"{total:,.0f}" if total else UNKNOWN


def _time(measured: Measured) -> str:
    seconds = sum(row.get("time/step_s", 0.0) for row in measured.rows)
    if not seconds:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _from_to(measured: Measured, metric: str) -> str:
    """First and last value on record."""
    values = [row[metric] for row in measured.rows if metric in row]
    if not values:
        return UNKNOWN
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values[0]:.3f} → {values[-1]:.3f} ({values[-1] - values[0]:+.3f})"

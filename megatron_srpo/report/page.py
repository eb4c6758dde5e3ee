"""How is all of it one page?   run folders -> report.html, which needs no network

`page.html` is the frame; style, chart library (uPlot) and the page's own script are put into it,
and the values as JSON: rollouts come last, so that charts do not wait for them.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_srpo.report.charts import Chart, charts
from megatron_srpo.report.experiments import Measured, experiments
from megatron_srpo.report.record import read_runs
from megatron_srpo.report.rollouts import Shown, show, to_json
from megatron_srpo.report.summary import summary
from megatron_srpo.report.tree import is_credit_known
from megatron_srpo.staging import write_durably

PAGE = Path(__file__).parent
MOST_BYTES = 12_000_000
"""Of rollouts, all runs together: the page stays under 15 MB."""
SHORTEST_WAIT_S = 10.0
"""From one report to the next, with --watch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that there is to show."""

    runs: tuple[Shown, ...]
    charts: tuple[Chart, ...]

    @property
    def measured(self) -> list[Measured]:
        return [shown.measured for shown in self.runs]


def read_report(roots: Sequence[Path], *, most_bytes: int = MOST_BYTES) -> Report:
    """Raises `InputError` for a folder that no run has begun in."""
    records = read_runs([*roots])
    shown = [show(run, most_bytes=most_bytes // len(records)) for run in records]
    drawn = charts(experiments([each.measured for each in shown]))
    return Report(runs=tuple(shown), charts=tuple(drawn))


def write_report(report: Report, out: Path, *, reload_s: float | None = None) -> None:
    """One file, whole or as it was. `reload_s`: the page loads itself anew so often."""
    write_durably(out, "".join(_page(report, reload_s)).encode())


def watch(roots: Sequence[Path], out: Path) -> Report:
    """Writes the report again while a run goes on; at most a tenth of the time is spent on it. The
    last one, of runs that have ended."""
    wait_s = SHORTEST_WAIT_S
    while True:
        began = time.monotonic()
        report = read_report(roots)
        goes_on = any(shown.measured.run.state == "runs" for shown in report.runs)
        write_report(report, out, reload_s=wait_s if goes_on else None)
        print(f"{out}: {_words(report)}", file=sys.stderr)
        if not goes_on:
            return report
        wait_s = max(SHORTEST_WAIT_S, 9 * (time.monotonic() - began))
        time.sleep(wait_s)


def _words(report: Report) -> str:
    states = (f"{shown.measured.run.name} {shown.measured.run.state}" for shown in report.runs)
    return ", ".join(states)


def _page(report: Report, reload_s: float | None) -> Iterator[str]:
    """The frame, its {{names}} filled in; not by `str.replace`, which would look into texts."""
    names = [shown.measured.run.name for shown in report.runs]
    values = {
        "title": html.escape(", ".join(names)),
        "style": _files("uplot.css", "page.css"),
        "values": to_json(_values(report, reload_s)),
        "rollouts": "[" + ",".join(_rollouts(shown) for shown in report.runs) + "]",
        "script": _files("uplot.js", "draw.js", "browse.js", "page.js"),
    }
    for part in (PAGE / "page.html").read_text("utf-8").split("{{"):
        name, closed, rest = part.partition("}}")
        yield values[name] + rest if closed else part


def _files(*names: str) -> str:
    return "\n".join((PAGE / name).read_text("utf-8") for name in names)


def _rollouts(shown: Shown) -> str:
    run = to_json(shown.measured.run.name)
    return f'{{"run":{run},"steps":[{",".join(shown.steps)}]}}'


def _values(report: Report, reload_s: float | None) -> dict[str, Any]:
    return {
        "reload_s": reload_s,
        "runs": [_run(shown) for shown in report.runs],
        "summary": summary(report.measured),
        "charts": [{"id": chart.id, **asdict(chart)} for chart in report.charts],
    }


def _run(shown: Shown) -> dict[str, Any]:
    """What the page says of a run in words."""
    run = shown.measured.run
    return {
        "name": run.name,
        "state": run.state,
        "alarms": run.alarms,
        "remarks": run.remarks,
        "missing": [*run.missing, *shown.missing],
        "shown": shown.num_prompts,
        "recorded": shown.num_recorded,
        "is_credit_known": is_credit_known(run.cfg),
        "delimiter": run.cfg.thoughts.delimiter if run.cfg else None,
    }

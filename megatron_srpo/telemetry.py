"""How does a run say how it goes?   metrics -> metrics.jsonl, log.txt, terminal, wandb, TensorBoard

Only rank 0 speaks; the other ranks hold a `Telemetry` whose folder is None. Stages return metrics,
the loops pass them here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import time
import traceback
import types
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_srpo.config_sections import LogConfig
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.staging import append_durably, write_durably
from megatron_srpo.stopwatch import Stopwatch

MOST_LINES = 100
"""What a loop prints where no terminal can redraw a line; log.txt has them all."""

BARS = "▁▂▃▄▅▆▇█"
NUM_BARS = 24
"""Steps whose pass rate the terminal shows."""


class PhaseColumn(ProgressColumn):
    """The phase that runs now, read whenever the terminal is redrawn."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self._stopwatch = stopwatch

    def render(self, task: Task) -> Text:
        return Text(f"{self._stopwatch.current:<9}", style="cyan")


class Log(logging.Handler):
    """log.txt, for people: what is said, and libraries' warnings. A disk that refuses a line of it
    stops nothing: what a run needs is written elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path
        self.last_alarm = ""
        """The first line of what the package itself warned of last; libraries warn of less."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record) + "\n")
        if record.name.startswith("megatron_srpo"):
            self.last_alarm = record.getMessage().partition("\n")[0]


def sparkline(values: Sequence[float]) -> str:
    """Shares as bars.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    return "".join(BARS[min(int(value * len(BARS)), len(BARS) - 1)] for value in values)


class Telemetry:
    """Context manager around a loop of `num_steps`."""

    def __init__(
        self,
        folder: RunFolder | None,
        cfg: LogConfig,
        *,
        name: str,
        num_steps: int,
        stopwatch: Stopwatch,
        first_step: int = 0,
    ) -> None:
        """`first_step` is above 0 where an earlier process has done the steps before it."""
        self._first_step = self._step = first_step
        self._folder, self._cfg, self._name = folder, cfg, name
        self._num_steps, self._stopwatch = num_steps, stopwatch
        self._began = time.perf_counter()
        self._pass_rates: deque[float] = deque(maxlen=NUM_BARS)
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Telemetry:
        if self._folder is None:
            return self
        self._log = Log(self._folder.log)
        logging.getLogger().addHandler(self._log)
        self._exits.callback(logging.getLogger().removeHandler, self._log)
        console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn(self._name),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            PhaseColumn(self._stopwatch),
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[pass_rates]}", style="green", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[alarm]}", style="yellow", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._exits.enter_context(self._progress)
        self._task = self._progress.add_task(
            "", total=self._num_steps, completed=self._first_step, pass_rates="", alarm=""
        )
        self._wandb = self._start_wandb() if self._cfg.wandb else None
        self._board = self._start_tensorboard() if self._cfg.tensorboard else None
        return self

    def _start_wandb(self):
        import wandb

        assert self._folder is not None
        mode = os.environ.get("WANDB_MODE")
        if mode is None and "WANDB_API_KEY" not in os.environ:
            mode = "offline"
        run = wandb.init(
            project=self._cfg.wandb_project,
            id=self._wandb_id(),
            resume="allow",
            name=self._folder.root.name,
            dir=str(self._folder.root),
            mode=mode,  # type: ignore[arg-type]
        )
        self._exits.callback(run.finish)
        return run

    def _wandb_id(self) -> str:
        """Of the run there, which goes on; drawn anew where there is none."""
        assert self._folder is not None
        path = self._folder.wandb_id
        if not path.exists():
            write_durably(path, f"{secrets.token_hex(4)}\n".encode())
        return path.read_text("utf-8").strip()

    def _start_tensorboard(self):
        from torch.utils.tensorboard import SummaryWriter

        assert self._folder is not None
        logdir = str(self._folder.root / "tensorboard")
        writer = SummaryWriter(logdir, purge_step=self._first_step)
        self._exits.callback(writer.close)
        return writer

    def log(self, step: int, metrics: Mapping[str, float], summary: str) -> None:
        """One line of metrics.jsonl; `summary` is what the terminal shows of it.

        Raises `AlarmError` if the disk refuses the line."""
        self._step = step + 1
        if self._folder is None:
            return
        # Before any checkpoint of what is behind this step: no crash leaves a gap.
        line = json.dumps({"step": step, **metrics}) + "\n"
        append_durably(self._folder.metrics, line.encode())
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        done = min(step + 1, self._num_steps)
        if "pass_rate/base" in metrics:
            self._pass_rates.append(metrics["pass_rate/base"])
        self._progress.update(
            self._task,
            completed=done,
            description=summary,
            pass_rates=sparkline(self._pass_rates),
            alarm=self._log.last_alarm,
        )
        per_step = (time.perf_counter() - self._began) / max(1, done - self._first_step)
        left = per_step * (self._num_steps - done)
        line = f"{self._name} {done}/{self._num_steps}  {summary}  {left:.0f} s left"
        self._log.write(line + "\n")
        is_shown = done % max(1, self._num_steps // MOST_LINES) == 0 or done == self._num_steps
        if self._progress.disable and is_shown:
            print(line, file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line for the person at the terminal."""
        if self._folder is None:
            return
        self._log.write(message + "\n")
        self._progress.console.print(message, highlight=False, soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"{self._name}: in step {self._step} of {self._num_steps}, from 0")
        if self._folder is not None and error is not None:
            self._log.write(f"stopped in step {self._step}: {error}\n")
            self._log.write("".join(traceback.format_exception(error)))
        self._exits.close()

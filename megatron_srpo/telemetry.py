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
from collections.abc import Mapping

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

from megatron_srpo.config import LogConfig
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.staging import write_durably
from megatron_srpo.stopwatch import Stopwatch

MOST_LINES = 100
"""What a loop prints where no terminal can redraw a line; log.txt has them all."""


class PhaseColumn(ProgressColumn):
    """The phase that runs now, read whenever the terminal is redrawn."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self._stopwatch = stopwatch

    def render(self, task: Task) -> Text:
        return Text(f"{self._stopwatch.current:<9}", style="cyan")


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
        self._first_step = first_step
        self._folder, self._cfg, self._name = folder, cfg, name
        self._num_steps, self._stopwatch = num_steps, stopwatch
        self._began = time.perf_counter()
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Telemetry:
        if self._folder is None:
            return self
        self._metrics = self._exits.enter_context(self._folder.metrics.open("a", encoding="utf-8"))
        self._log = self._exits.enter_context(self._folder.log.open("a", encoding="utf-8"))
        handler = logging.StreamHandler(self._log)
        handler.setLevel(logging.WARNING)
        logging.getLogger().addHandler(handler)
        self._exits.callback(logging.getLogger().removeHandler, handler)
        console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn(self._name),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            PhaseColumn(self._stopwatch),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._exits.enter_context(self._progress)
        self._task = self._progress.add_task("", total=self._num_steps, completed=self._first_step)
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
        writer = SummaryWriter(logdir, purge_step=self._first_step or None)
        self._exits.callback(writer.close)
        return writer

    def log(self, step: int, metrics: Mapping[str, float], summary: str) -> None:
        """One line of metrics.jsonl; `summary` is what the terminal shows of it."""
        if self._folder is None:
            return
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        done = min(step + 1, self._num_steps)
        self._progress.update(self._task, completed=done, description=summary)
        per_step = (time.perf_counter() - self._began) / max(1, done - self._first_step)
        left = per_step * (self._num_steps - done)
        line = f"{self._name} {done}/{self._num_steps}  {summary}  {left:.0f} s left"
        self._log.write(line + "\n")
        self._log.flush()
        is_shown = done % max(1, self._num_steps // MOST_LINES) == 0 or done == self._num_steps
        if self._progress.disable and is_shown:
            print(line, file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line for the person at the terminal."""
        if self._folder is None:
            return
        self._log.write(message + "\n")
        self._log.flush()
        self._progress.console.print(message, highlight=False, soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._folder is not None and error is not None:
            self._log.write(f"stopped: {error}\n")
            self._log.writelines(traceback.format_exception(error))
        self._exits.close()

"""What a run leaves:  config.yaml metrics.jsonl log.txt rollouts/ checkpoints/ hf/ report.html

Who works in it holds a lock on its log.txt, from before anything is written to the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_srpo.config import Config
from megatron_srpo.config_file import dump_config
from megatron_srpo.types import InputError

PROBE = ".preflight-"
"""So begin the names of files that the preflight tries a folder with."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def replay(self) -> Path:
        """Names the run whose rollouts this one trains on; not there if it draws its own."""
        return self.root / "replay.txt"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def profile(self) -> Path:
        """Trace and summary of a run with `--profile`."""
        return self.root / "profile"

    @property
    def kept(self) -> Path:
        """What a step that was stopped had finished; there only until it is done."""
        return self.root / "kept"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    def read_metrics(self) -> list[dict[str, float]]:
        """A row a step, of a run whose lines are whole."""
        return [json.loads(line) for line in self.metrics.read_text("utf-8").splitlines()]

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def hf(self) -> Path:
        """The trained policy in Hugging Face format."""
        return self.root / "hf"

    @property
    def report(self) -> Path:
        """One page that shows all of it; can be made again at any time."""
        return self.root / "report.html"

    @property
    def wandb_id(self) -> Path:
        """Names the run there, which goes on with this one."""
        return self.root / "wandb_id.txt"

    @property
    def is_begun(self) -> bool:
        """A run began here."""
        return self.config.is_file()

    @property
    def is_finished(self) -> bool:
        """It has left the trained policy, the last thing that a run leaves; a warm start, which has
        no rollouts, is none."""
        return self.is_begun and self.rollouts.is_dir() and self.hf.exists()

    def check_free(self) -> None:
        """Raises `InputError` if another run lives here, or something that is no folder."""
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"run_dir={self.root}: exists and is not a folder")
        if self.root.is_dir() and not self._is_bare():
            raise InputError(
                f"run_dir={self.root}: already holds another run; name a new folder "
                "(run_dir=PATH) or remove this one"
            )
        parent = next(path for path in self.root.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"run_dir={self.root}: {parent} is no folder that can be written to")

    def _is_bare(self) -> bool:
        """Nothing is there but what a run leaves that was killed before it had its config, and what
        its other ranks are trying the folder with."""
        begun = {self._partial_config, self.replay, self.log, *self.probes()}
        return {*self.root.iterdir()} <= begun and not (
            self.log.is_file() and self.log.stat().st_size
        )

    def probes(self) -> list[Path]:
        """Of the preflight: there for a moment, or left by a kill."""
        return [*self.root.glob(f"{PROBE}*")]

    def check_idle(self) -> None:
        """Raises `InputError` if a process is at work here, or nobody may be."""
        if self.log.is_file():
            try:
                with self.log.open("a", encoding="utf-8") as log:
                    self._lock(log, fcntl.LOCK_SH)
            except OSError as error:
                raise InputError(f"run_dir={self.root}: {error}") from error

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Nobody else works here meanwhile; makes the folder. `InputError` if somebody does."""
        self.root.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            self._lock(log, fcntl.LOCK_EX)
            yield

    def _lock(self, log: IO[str], kind: int) -> None:
        """Until `log`, the open log.txt, is closed here and in processes that were forked.

        Raises `InputError` if another process holds it. A file system without locks has none.
        """
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(log, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"run_dir={self.root}: another process is at work there; stop it first"
                ) from error

    @property
    def _partial_config(self) -> Path:
        return self.config.with_name(self.config.name + ".partial")

    def create(self, cfg: Config, replay: Path | None = None) -> None:
        """The config comes last: with it this is a run."""
        self.root.mkdir(parents=True, exist_ok=True)
        if replay is None:
            self.replay.unlink(missing_ok=True)
        else:
            self.replay.write_text(f"{replay.resolve()}\n", "utf-8")
        self._partial_config.write_text(dump_config(cfg), "utf-8")
        self._partial_config.rename(self.config)

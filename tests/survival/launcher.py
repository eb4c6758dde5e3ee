"""Starts a run's ranks as a launcher does, and ends them as one does.

Ranks are forked from a server that has imported everything (`preloaded.py`): a start takes seconds.
Each is the leader of a process group, which holds whatever it starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.parallel.pool import _free_port, forked
from tests.survival.board import Board

PATIENCE_S = 3.0
"""So long those that are left may take to end by themselves."""
LIMIT_S = 240.0


class Attempt:
    """One start of a command on so many ranks."""

    def __init__(
        self,
        folder: Path,
        number: int,
        ranks: int,
        command: Sequence[str],
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        """`folder` is for what the ranks say and show."""
        context = forked()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._number = folder, number
        self.board = Board(folder / f"{number:03d}.board")
        meeting = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        self.began = time.monotonic()
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            environment = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(
                context.Process(
                    target=_be_rank, args=(folder, number, environment, command, prepare)
                )
            )
            self.processes[-1].start()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        self.board.__exit__(None, None, None)

    @property
    def exit_codes(self) -> list[int | None]:
        """None: still there."""
        return [process.exitcode for process in self.processes]

    def is_over(self) -> bool:
        """A rank has ended, whichever way."""
        return any(code is not None for code in self.exit_codes)

    def wait(self, seconds: float) -> bool:
        """Whether all ranks have ended by themselves within that time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return None not in self.exit_codes

    def finish(self) -> list[int | None]:
        """Exit codes; the others are ended when one has failed."""
        deadline = time.monotonic() + LIMIT_S
        while None in self.exit_codes and time.monotonic() < deadline:
            if any(self.exit_codes):
                self.wait(PATIENCE_S)
                break
            time.sleep(0.02)
        codes = self.exit_codes
        self.end()
        return codes

    def end(self) -> None:
        """Whatever is left of any rank's process group, as Slurm ends what is left of a job."""
        for process in self.processes:
            kill_group(process)
        for process in self.processes:
            process.join()
            _wait_for_group(process)

    def said(self, rank: int = 0) -> str:
        return (self._folder / f"{self._number:03d}-{rank}.log").read_text("utf-8")


def _be_rank(*arguments: Any) -> None:
    """In the forked process, which has imported it already."""
    from tests.survival.victim import be_rank

    be_rank(*arguments)


def kill_group(process: BaseProcess) -> None:
    """At once, with whatever it has started."""
    assert process.pid is not None
    # A rank that has only been forked has no group of its own yet.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _wait_for_group(process: BaseProcess) -> None:
    assert process.pid is not None
    deadline = time.monotonic() + PATIENCE_S
    while any(_members(process.pid)):
        assert time.monotonic() < deadline, f"group {process.pid} does not end"
        time.sleep(0.005)


def _members(group: int) -> Iterator[int]:
    """Processes of the group that are no zombies."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            state, _, pgid = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == group and state != "Z":
                yield int(entry.name)

"""A rank of a run as the command line starts it, which shows its phase and notes what it draws.

board           the phase, at every moment (`board.py`)
phases.jsonl    at the end: how long each phase took, each time
drawn.jsonl     a line for each batch of requests that it sends to its engine
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_srpo import assembly, train
from megatron_srpo.__main__ import main
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.telemetry import Telemetry
from megatron_srpo.types import Completion, Request
from tests.survival.board import Board


@dataclass(slots=True)
class Watched:
    """Hooks into the package; none of them waits for anything."""

    folder: Path
    attempt: int
    rank: int
    board: Board
    step: int = -1
    """Whose rollouts are being drawn."""
    began: float = 0.0
    """The first step."""
    phase: str = "start"
    since: float = 0.0
    seconds: list[tuple[str, float]] = field(default_factory=list)

    def show(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds.append((self.phase, now - self.since))
        self.phase, self.since = phase, now
        self.board.show(self.rank, phase)

    def note(self, row: dict[str, Any]) -> None:
        """In one write: whole, also if the process is killed behind it."""
        path = self.folder / "drawn.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, (json.dumps(row) + "\n").encode())
        os.close(file)

    def hooks(self) -> Iterator[Any]:
        """Patches."""
        switch, generate, log = Stopwatch._switch, VllmGenerator.generate, Telemetry.log
        loop, save, collect = train.loop, train.save_hf, assembly.collect_groups

        def switched(stopwatch: Stopwatch, name: str) -> None:
            switch(stopwatch, name)
            if self.began:
                self.show(name)

        def looped(*arguments: Any) -> None:
            self.began = time.monotonic()
            self.show("other")
            loop(*arguments)

        def saved(*arguments: Any, **more: Any) -> None:
            self.show("export")
            save(*arguments, **more)
            self.show("other")

        def collected(*arguments: Any, step: int, **more: Any) -> Any:
            self.step = step
            return collect(*arguments, step=step, **more)

        def generated(engine: VllmGenerator, requests: Sequence[Request]) -> Iterator[Completion]:
            purposes = {request.purpose for request in requests}
            if purposes - {"probe"}:
                row = {"attempt": self.attempt, "step": self.step, "requests": len(requests)}
                self.note(row | {"purpose": "/".join(sorted(purposes))})
            return generate(engine, requests)

        def logged(telemetry: Telemetry, *arguments: Any) -> None:
            log(telemetry, *arguments)
            if not self.board.first_step(self.rank)[1]:
                self.board.mark(self.rank, began=self.began, done=time.monotonic())

        yield mock.patch.object(Stopwatch, "_switch", switched)
        yield mock.patch.object(train, "loop", looped)
        yield mock.patch.object(train, "save_hf", saved)
        yield mock.patch.object(assembly, "collect_groups", collected)
        yield mock.patch.object(VllmGenerator, "generate", generated)
        yield mock.patch.object(Telemetry, "log", logged)


def be_rank(
    folder: Path,
    attempt: int,
    environment: dict[str, str],
    command: Sequence[str],
    prepare: Callable[[int], None] | None,
) -> None:
    """The whole life of a rank, which is the leader of its process group. Exits as the command.

    `prepare`: what else is done in the process before, of the rank.
    """
    os.setpgid(0, 0)
    os.environ |= environment
    rank = int(environment["RANK"])
    _speak_to(folder / f"{attempt:03d}-{rank}.log")
    with Board(folder / f"{attempt:03d}.board") as board, ExitStack() as patched:
        watched = Watched(folder, attempt, rank, board, since=time.monotonic())
        for hook in watched.hooks():
            patched.enter_context(hook)
        if prepare is not None:
            prepare(rank)
        code = main(list(command))
        watched.show("done")
    if code:
        sys.exit(code)
    lines = "".join(json.dumps(pair) + "\n" for pair in watched.seconds)
    (folder / f"{attempt:03d}-{rank}.phases.jsonl").write_text(lines)


def _speak_to(log: Path) -> None:
    """Both streams."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)

"""One kill -9 from outside: when it comes, whom it hits, what it hit, how the others ended."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.survival.launcher import LIMIT_S, PATIENCE_S, Attempt, kill_group

POLL_S = 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What is wanted."""

    phase: str
    occurrence: int
    """The kill waits until the phase has come so often."""
    fraction: float
    """Of the time that the phase usually takes in an uninterrupted run."""
    victim: int | None
    """A rank, alone; None: all ranks at once, with all that they have started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What came of it."""

    wanted: str
    victim: int | None
    phase: str
    """The victim's when it was dead; the first rank's, if all were hit or the victim is none that
    has this phase."""
    phases: list[str]
    """Every rank's, then."""
    was_saving: bool
    """A checkpoint was being written, in the background or not."""
    others: list[str]
    """How each of the other ranks ended."""
    seconds_to_step: float | None
    """From the start that this kill ended to the end of the first step that it did."""
    seconds_to_loop: float | None
    """Of these, until that step began."""


def plan(phases: Sequence[str], num: int, *, ranks: int, rng: random.Random) -> list[Kill]:
    """Each phase equally often; every second kill hits one rank, the others all."""
    return [
        Kill(
            phase=phases[index % len(phases)],
            occurrence=rng.randint(1, 8) if phases[index % len(phases)] == "reward" else 1,
            fraction=rng.random(),
            victim=rng.choice([None, rng.randrange(ranks)]),
        )
        for index in range(num)
    ]


def strike(
    attempt: Attempt, kill: Kill, usual: Sequence[Mapping[str, float]], checkpoints: Path
) -> Hit | None:
    """None if the run has ended before the phase came. `usual`: of each rank."""
    hit = kill.victim or 0
    # Rewards and the journal are their replica's leader's.
    watched = hit if kill.phase in usual[hit] else 0
    if not _comes(attempt, kill, watched, usual[watched].get(kill.phase, 0.0)):
        return None
    if kill.victim is None:
        for process in attempt.processes:
            kill_group(process)
    else:
        pid = attempt.processes[hit].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    attempt.processes[hit].join()
    ranks = range(len(attempt.processes))
    phases = [attempt.board.phase(rank) for rank in ranks]
    was_saving = any(checkpoints.glob("*.partial"))
    attempt.wait(PATIENCE_S)
    codes = attempt.exit_codes
    attempt.end()
    began, done = attempt.board.first_step(watched)
    return Hit(
        wanted=kill.phase,
        victim=kill.victim,
        phase=phases[watched],
        phases=phases,
        was_saving=was_saving,
        others=[_end(codes[rank]) for rank in ranks if kill.victim not in (None, rank)],
        seconds_to_step=done - attempt.began if done else None,
        seconds_to_loop=began - attempt.began if done else None,
    )


def _end(code: int | None) -> str:
    if code is None:
        return "waited, ended by the launcher"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _comes(attempt: Attempt, kill: Kill, rank: int, usual: float) -> bool:
    """Whether the rank is in that phase now, and has been for the time that the kill wants."""
    seen, deadline = 0, time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if not _reaches(attempt, rank, kill.phase, deadline):
            return False
        seen += 1
        if seen >= kill.occurrence:
            # Shorter each time that it was too long.
            time.sleep(kill.fraction * usual / (seen - kill.occurrence + 1))
            if attempt.board.phase(rank) == kill.phase:
                return True
        while attempt.board.phase(rank) == kill.phase and not attempt.is_over():
            time.sleep(POLL_S)
    raise TimeoutError(f"phase {kill.phase} does not come:\n{attempt.said(rank)}")


def _reaches(attempt: Attempt, rank: int, phase: str, deadline: float) -> bool:
    """Looks for the phase often, and seldom whether the run is over."""
    while not attempt.is_over() and time.monotonic() < deadline:
        for _ in range(500):
            if attempt.board.phase(rank) == phase:
                return True
            time.sleep(POLL_S)
    return attempt.board.phase(rank) == phase and not attempt.is_over()

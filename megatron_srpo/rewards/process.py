"""A reward of the user's, in a process beside the trainer: it may die or hang without harm.

`LeaderReward` calls it on the first rank of a rollout engine only, so there is one process an
engine. It starts with the first item, and ends with this object, or with the trainer, however that
ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from multiprocessing.connection import Connection, Pipe

from megatron_srpo.rewards.verdict import RewardRaisedError
from megatron_srpo.types import Prompt, Score

NUM_ATTEMPTS = 2
START_S = 120.0
"""So long the user's file may take to be imported."""
LOOK_S = 0.1
"""Seconds between looks at a process that says nothing. Its end closes the connection, unless a
process that it forked holds it open."""


class ProcessReward:
    """Implements `protocols.Reward`. One thread may call it: its process ends with that thread."""

    def __init__(self, name: str, *, timeout_s: float) -> None:
        """`name`: FILE.py:FUNCTION, where `extensions.find` finds something."""
        self._name, self._timeout_s = name, timeout_s
        self._worker: _Worker | None = None

    def __call__(self, prompt: Prompt, response: str) -> Score:
        """A process that is lost over this item costs it one more attempt, in a new process; then
        it has a `failure`. Raises `RewardRaisedError` if the reward or its file raises, and
        `StartError` if no process comes to the end of the file.
        """
        losses: list[str] = []
        while len(losses) < NUM_ATTEMPTS:
            if self._worker is None or self._worker.is_gone:
                self._worker = _start(self._name)
            try:
                return self._worker.ask((prompt, response), timeout_s=self._timeout_s)
            except LostError as error:
                losses.append(str(error))
                self._worker = None
        return Score(value=0.0, correct=False, failure=f"its process {_in_words(losses)}")


class LostError(Exception):
    """A worker will not answer any more; the message says what its process did."""


class StartError(RuntimeError):
    """The process did not get so far that it could be asked."""


def _start(name: str) -> _Worker:
    try:
        return _Worker(name)
    except LostError as error:  # no item's doing: none would get a verdict
        raise StartError(f"its process {error} before it was asked") from error


def _in_words(losses: list[str]) -> str:
    """
    >>> _in_words(["died with signal 9"] * 2), _in_words(["took longer than 1 s", "ended with 3"])
    ('died with signal 9, twice', 'took longer than 1 s, then ended with 3')
    """
    first, second = losses
    return f"{first}, twice" if first == second else f"{first}, then {second}"


class _Worker:
    """One process, ready to be asked. Raises `LostError` if it does not get so far."""

    def __init__(self, name: str) -> None:
        self._channel, theirs = Pipe()
        serve = (theirs.fileno(), name, os.getpid())
        # What can be imported here can be imported there; the main module is not.
        program = (
            f"import sys; sys.path[:] = {[*map(str, sys.path)]}; "
            f"from megatron_srpo.rewards.worker import serve; serve{serve}"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,  # the trainer's standard output is for results
                start_new_session=True,  # so that it can be killed with all that it started
            )
        self._end = weakref.finalize(self, _kill, self._process, self._channel, os.getpid())
        self._answer(START_S)

    def ask(self, item: tuple[Prompt, str], *, timeout_s: float) -> Score:
        """Raises `RewardRaisedError`, and `LostError` where no answer will come."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then no answer comes
            self._channel.send(item)
        score = self._answer(timeout_s)
        assert score is not None, "a worker says only once that it has started"
        return score

    @property
    def is_gone(self) -> bool:
        """It stays a zombie until `_kill`, so that its id is nobody else's."""
        looks = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, looks) is not None

    def _answer(self, timeout_s: float) -> Score | None:
        deadline = time.monotonic() + timeout_s
        while not self._channel.poll(max(0.0, min(LOOK_S, deadline - time.monotonic()))):
            if self.is_gone and not self._channel.poll():
                raise LostError(self._ending())
            if time.monotonic() >= deadline:
                self._end()
                raise LostError(f"took longer than {timeout_s:g} s")
        try:
            answer = self._channel.recv()
        except (EOFError, ConnectionResetError) as error:
            raise LostError(self._ending()) from error
        if isinstance(answer, RewardRaisedError):
            raise answer
        return answer

    def _ending(self) -> str:
        """How the process ended by itself: what it started is ended now."""
        self._end()
        code = self._process.returncode
        return f"died with signal {-code}" if code < 0 else f"ended with exit code {code}"


def _kill(process: subprocess.Popen[bytes], channel: Connection, trainer: int) -> None:
    """With all processes of its session's first group. Not from a fork of the trainer."""
    channel.close()
    if os.getpid() == trainer:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

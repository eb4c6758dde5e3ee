"""A process in which a reward runs, as the trainer sees it: started, asked, given up.

It may die or hang without harm. It ends with this object, or with the trainer, however that ends.
Nothing here waits for it.
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

from megatron_srpo.rewards.messages import packed_item, verdict_in
from megatron_srpo.rewards.verdict import RewardRaisedError
from megatron_srpo.types import Prompt, Sandbox, Score

START_S = 120.0
"""So long the reward's file may take to be imported."""
NUM_BUFFERED = 2**16
"""Bytes that a connection takes though nobody reads yet."""


class LostError(Exception):
    """A worker will not answer any more; the message says what its process did."""


class StartError(RuntimeError):
    """The process did not get so far that it could be asked."""


class Worker:
    """One process. It starts at once; when it has answered, the next item can be asked about.

    One thread may use it: the process ends with that thread.
    """

    def __init__(self, name: str, *, timeout_s: float, sandbox: Sandbox = "namespaces") -> None:
        """Arguments as of `reward_named`. Raises `StartError` if there can be no process."""
        self._channel, theirs = Pipe()
        serve = (theirs.fileno(), os.getpid(), name, timeout_s, sandbox)
        # What can be imported here can be imported there; the main module is not.
        program = (
            f"import sys; sys.path[:] = {[*map(str, sys.path)]}; "
            f"from megatron_srpo.rewards.worker import serve; serve{serve}"
        )
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.__stderr__,  # the trainer's standard output is for results
                    start_new_session=True,  # so that it can be killed with all that it started
                )
        except OSError as error:
            raise StartError(f"no process could be started: {error}") from error
        self.end = weakref.finalize(self, _kill, self._process, self._channel, os.getpid())
        """Ends the process with all of its group: what began a session of its own lives on."""
        self.is_started = False
        """It can be asked, and may be fast."""
        self._unsent = b""
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + START_S

    def fileno(self) -> int:
        """Can be read when there is something to hear."""
        return self._channel.fileno()

    def ask(self, prompt: Prompt, response: str) -> None:
        """Of a process that has answered, or that has not been asked yet: then its time begins when
        it has started."""
        item = packed_item(prompt, response)
        if self.is_started:
            self._begin(item)
        elif len(item) > NUM_BUFFERED:
            self._unsent = item
        else:
            self._send(item)

    def _begin(self, item: bytes) -> None:
        self._send(item)
        self._deadline = time.monotonic() + self._timeout_s

    def _send(self, item: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then no answer comes
            if item:
                self._channel.send_bytes(item)

    def hear(self) -> Score | None:
        """What it says, which is there to be read; None: it has started.

        Raises `RewardRaisedError`; `LostError` where no answer will come; `StartError` if none ever
        would, whatever the item.
        """
        try:
            said = verdict_in(self._channel.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise self._lost(self._ending()) from error
        if isinstance(said, RewardRaisedError):
            raise said
        if said is None:
            self.is_started = True
            self._begin(self._unsent)
        return said

    def look(self) -> None:
        """At one that says nothing. Raises as `hear` does if it is gone, or has taken too long: its
        end closes the connection, unless a process that it forked holds it open."""
        if self._channel.poll():
            return
        if self.is_gone and not self._channel.poll():
            raise self._lost(self._ending())
        if time.monotonic() >= self._deadline:
            self.end()
            limit_s = self._timeout_s if self.is_started else START_S
            raise self._lost(f"took longer than {limit_s:g} s")

    @property
    def is_gone(self) -> bool:
        """It stays a zombie until `end`, so that its id is nobody else's."""
        looks = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, looks) is not None

    def _ending(self) -> str:
        """How the process ended by itself: what it started is ended now."""
        self.end()
        code = self._process.returncode
        return f"died with signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _lost(self, what: str) -> Exception:
        """Before it has started, that is no item's doing: none would get a verdict."""
        if self.is_started:
            return LostError(what)
        return StartError(f"its process {what} before it was asked")


def _kill(process: subprocess.Popen[bytes], channel: Connection, trainer: int) -> None:
    """With all processes of its session's first group. Not from a fork of the trainer."""
    channel.close()
    if os.getpid() == trainer:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

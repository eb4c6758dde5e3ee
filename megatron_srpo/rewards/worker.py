"""The process in which a reward runs: what it breaks there is not the trainer.

`process.py` starts it. It imports little, since a worker that was lost is replaced while an engine
waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection

from megatron_srpo.rewards import reward_named
from megatron_srpo.rewards.messages import STARTED, item_in, packed_verdict
from megatron_srpo.rewards.verdict import RewardRaisedError, checked
from megatron_srpo.types import Prompt, Sandbox

PR_SET_PDEATHSIG = 1
"""linux/prctl.h: the signal that a process gets when the thread that started it ends."""


def serve(descriptor: int, trainer: int, name: str, timeout_s: float, sandbox: Sandbox) -> None:
    """Says `STARTED` when the reward is imported, then a `Score` for each (prompt, response), until
    nobody listens. What the file or the reward raises is said instead, and ends the process.

    `descriptor`: an end of the connection, which stays open until the process is gone; `trainer`:
    id of the process that asks; the others as of `reward_named`.
    """
    _end_with(trainer)
    # A launcher that stops a run signals all processes: the trainer still needs this one then. Not
    # SIG_IGN, which programs that a reward starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _left_to_the_trainer)
    os.set_inheritable(descriptor, False)
    sys.excepthook = _left_to_the_trainer
    channel = Connection(os.dup(descriptor))
    worker = os.getpid()
    with _saying_what_is_raised(channel, worker):
        reward = reward_named(name, timeout_s=timeout_s, sandbox=sandbox)
        channel.send_bytes(STARTED)
        for prompt, response in _items(channel):
            score = checked(reward(prompt, response))
            if os.getpid() != worker:  # a fork that came back: its answer would be the next item's
                os._exit(0)
            channel.send_bytes(packed_verdict(score))


def _items(channel: Connection) -> Iterator[tuple[Prompt, str]]:
    while True:
        try:
            yield item_in(channel.recv_bytes())
        except EOFError:
            return


@contextlib.contextmanager
def _saying_what_is_raised(channel: Connection, worker: int) -> Generator[None]:
    """A reward that leaves (`sys.exit`) has said nothing: its process has ended. So has a fork of
    the process `worker`, whatever it raised."""
    try:
        yield
    finally:
        error = sys.exception()
        is_worker = os.getpid() == worker
        if error is not None and not isinstance(error, SystemExit) and is_worker:
            channel.send_bytes(packed_verdict(RewardRaisedError.of(error)))


def _end_with(trainer: int) -> None:
    """Also if that is killed while a reward runs, which then reads from no connection."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:  # it ended before it could be watched
        sys.exit()


def _left_to_the_trainer(*_: object) -> None:
    """Neither ends this process nor prints."""

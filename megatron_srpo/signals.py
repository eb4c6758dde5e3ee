"""What is a process told from outside?   signals -> bytes in a socket

Python calls handlers in the main thread only, between two lines of Python. Here that thread may be
in a collective for minutes; the bytes come at once, and another thread can wait for them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""Each asks a run to stop."""


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """Instead of what they do otherwise, the signals are in the socket for `heard`. Only the main
    thread can set that up; in others nothing comes."""
    inbox, outbox = socket.socketpair()
    with inbox, outbox:
        if threading.current_thread() is not threading.main_thread():
            yield inbox
            return
        outbox.setblocking(False)
        before = {number: signal.signal(number, _go_on) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        try:
            yield inbox
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


def heard(inbox: socket.socket, *, within: float) -> list[str]:
    """Names of signals as soon as some come, or nothing after so many seconds. Others that somebody
    has a handler for, such as an alarm clock's, are in the socket too, and are not meant."""
    ready, _, _ = select.select([inbox], [], [], within)
    numbers = inbox.recv(64) if ready else b""
    return [signal.Signals(number).name for number in numbers if number in SIGNALS]


def _go_on(number: int, frame: object) -> None:
    """A handler must be there for the byte to come."""


def _be_mortal() -> None:
    """A forked process must not tell its parent of its own signals, and must end by them."""
    listened = [number for number in SIGNALS if signal.getsignal(number) is _go_on]
    if listened:
        signal.set_wakeup_fd(-1)
    for number in listened:
        signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_be_mortal)

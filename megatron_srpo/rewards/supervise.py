"""How does a sandbox's process end?   it is read and watched, killed when it must be, reaped"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import Literal

START_S = 10.0
"""So long a sandbox may take to be closed around its program; it takes 0.03 s."""
END_S = 1.0
"""So long a killed sandbox may take to end by itself."""
CHUNK_BYTES = 2**16


End = Literal["exit", "time", "output"]
"""By itself; killed for its time, or for its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a program did."""

    end: End
    exit_code: int
    """Not 0 after an uncaught exception, a signal or a kill."""
    output: bytes
    """Standard output; of a function its result, as JSON. Whatever the program wanted it to be."""
    errors: bytes
    """Standard error."""

    @property
    def ended_well(self) -> bool:
        """By itself, in time, without an error."""
        return self.end == "exit" and self.exit_code == 0


class SandboxError(RuntimeError):
    """The sandbox was not closed, so that the program was not run."""


class Supervised:
    """One process of `root_folder.command`, its standard output and error being pipes.

    `ready` says a byte when the sandbox is closed; `info` says who is process 1 in it, if it is
    not the process itself.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, ready: int, info: int) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process, self._ready, self._info = process, ready, info
        self._output, self._errors = process.stdout.fileno(), process.stderr.fileno()
        self._said = {fd: bytearray() for fd in (ready, info, self._output, self._errors)}

    def to_the_end(self, *, wall_s: float, num_bytes: int, until: float) -> Run:
        """Waits for the program, which has `wall_s` from when it begins, but not after `until`,
        and may write `num_bytes`.

        Raises `SandboxError`. Afterwards there is no process, whatever is raised.
        """
        with self._process:
            try:
                end = self._watch(wall_s, num_bytes, until)
            finally:
                self._kill()
        if not self._said[self._ready]:
            words = self._said[self._errors][-1000:].decode(errors="replace").strip()
            raise SandboxError(f"no sandbox was closed: {words or 'it took too long'}")
        output, errors = bytes(self._said[self._output]), bytes(self._said[self._errors])
        exit_code = self._process.returncode
        return Run(end=end, exit_code=exit_code, output=output, errors=errors)

    def _watch(self, wall_s: float, num_bytes: int, until: float) -> End:
        deadline = min(until, time.monotonic() + START_S)
        has_begun = False
        ended = os.pidfd_open(self._process.pid)
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            stack.callback(os.close, ended)
            for fd in (*self._said, ended):
                selector.register(fd, selectors.EVENT_READ)
            while (left_s := deadline - time.monotonic()) > 0:
                events = {key.fd for key, _ in selector.select(left_s)}
                self._listen(events - {ended}, selector)
                if not has_begun and self._said[self._ready]:
                    has_begun, deadline = True, min(until, time.monotonic() + wall_s)
                if len(self._said[self._output]) + len(self._said[self._errors]) > num_bytes:
                    return "output"
                if events == {ended}:  # nothing is left to be read
                    return "exit"
        return "time"

    def _listen(self, fds: set[int], selector: selectors.BaseSelector) -> None:
        for fd in fds:
            heard = os.read(fd, CHUNK_BYTES)
            self._said[fd] += heard
            if not heard:
                selector.unregister(fd)

    def _kill(self) -> None:
        """Process 1 first: what started it then ends by itself, and leaves no orphan."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(ValueError, ProcessLookupError):  # it is not known yet, or gone
            os.kill(json.loads(self._said[self._info])["child-pid"], signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

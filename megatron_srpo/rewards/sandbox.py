"""What did an untrusted program print?   run where it can neither see nor harm anything

Three levels, strongest first: bubblewrap (its `bwrap`), namespaces (`namespaces.py` in its place),
limits (no namespaces: Landlock hides the machine's files). On every level `inside.py` gives up what
a process can give up itself: memory, time, threads and output are limited, and there is no system
call (`seccomp.py`) that would make a process, open a file for writing, make a socket or send a
signal. So one kill ends all that a program is, and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import marshal
import os
import platform
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_srpo.rewards.root_folder import (
    LEVELS,
    Descriptors,
    Level,
    command,
    rules,
)
from megatron_srpo.rewards.seccomp import program_filter
from megatron_srpo.rewards.supervise import START_S, Run, SandboxError, Supervised
from megatron_srpo.types import InputError

ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All of it. Sets of strings have one order, so that a verdict is the same in every run."""
FIRST_USER = 1_900_000_000
"""Root's programs run as this user plus a thread's id: nobody else's, each counted by itself."""
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one run."""

    wall_s: float = 10.0
    """Seconds on the wall from when the program begins; as many of one core's, and one more."""
    memory_mb: int = 2048
    """Of address space, 2^20 bytes each, the interpreter's 30 included."""
    num_threads: int = 64
    output_mb: int = 8
    """Standard output and standard error together; a program that writes more is killed."""


@functools.cache
def strongest() -> Level | None:
    """The strongest level at which a program runs here, found by trying; None if at none."""
    for level in LEVELS:
        with contextlib.suppress(SandboxError, OSError, KeyError):
            if run("print(6 * 7)", level=level).output == b"42\n":
                return level
    return None


def checked(weakest: Level, *, key: str = "sandbox") -> Level:
    """The level in use: the strongest. `InputError` if that is weaker than the config accepts."""
    found = strongest()
    if found is None:
        raise InputError(
            f"{key}={weakest}: no sandbox works on this machine: programs cannot be judged here"
        )
    if LEVELS.index(found) > LEVELS.index(weakest):
        raise InputError(
            f"{key}={weakest}: this machine offers {found} only: install the package bubblewrap, "
            f"allow user namespaces, or accept {key}={found}"
        )
    return found


def run(
    program: str,
    stdin: bytes = b"",
    *,
    level: Level,
    function: str | None = None,
    prelude: str = "",
    limits: Limits | None = None,
    until: float | None = None,
) -> Run:
    """Runs a Python program to its end, which comes by `until` (`time.monotonic`) at the latest,
    but for `END_S`.

    With `function`, that function is called (a method of class Solution, if that has it) with the
    JSON values in the lines of `stdin`. `prelude` runs before the program. Raises `SandboxError`,
    and `OSError` if no process can be started.
    """
    limits = limits or Limits()
    until = time.monotonic() + START_S + limits.wall_s if until is None else until
    with ExitStack() as stack:
        (ready, says_ready), (info, says_info) = _pipe(stack), _pipe(stack)
        fds = Descriptors(
            job=_sealed(stack, _job(program, prelude, function, level, limits)),
            ready=says_ready,
            info=says_info,
            stdin=_sealed(stack, stdin),
        )
        process = subprocess.Popen(
            command(level, fds),
            stdin=_opened_again(stack, fds.stdin),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=fds.all(),
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        os.close(says_ready)
        os.close(says_info)
        supervised = Supervised(process, ready=ready, info=info)
        num_bytes = limits.output_mb * 2**20
        return supervised.to_the_end(wall_s=limits.wall_s, num_bytes=num_bytes, until=until)


def _job(program: str, prelude: str, function: str | None, level: Level, limits: Limits) -> bytes:
    """For `inside.py`, whose interpreter is of the same version."""
    return marshal.dumps(
        {
            "program": program,
            "prelude": prelude,
            "function": function,
            "level": level,
            "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_mb * 2**20,
            "num_threads": limits.num_threads,
            "user": FIRST_USER + threading.get_native_id(),
            "paths": rules(level),
            "filter": program_filter(platform.machine()),
        }
    )


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """The reading end, which is closed with `stack`, and the writing end, which is the caller's."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    return reading, writing


def _sealed(stack: ExitStack, content: bytes) -> int:
    """A file in memory that nobody can change any more, to be read from its beginning."""
    fd = os.memfd_create("", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def _opened_again(stack: ExitStack, fd: int) -> int:
    """The same file, with a position of its own."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, again)
    return again

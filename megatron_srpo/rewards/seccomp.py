"""Which system calls may a program under test make?   -> a seccomp filter

Those that a Python interpreter needs to compute, to read files and to start threads: none that
makes a process, opens a file for writing, makes a socket, sends a signal or mounts. What is not
listed does not exist (ENOSYS), so that a newer C library falls back on what it used before.

In classic BPF, as linux/seccomp.h and linux/filter.h describe it; the numbers are those of
asm/unistd_64.h and asm-generic/unistd.h. The sandbox's interpreter imports no packages, and
libseccomp's bindings are in no wheel.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Iterator

AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""linux/audit.h, by `platform.machine()`"""

# fmt: off
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # computing, memory, time
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233), "getrandom": (318, 278), "arch_prctl": (158, None),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "prlimit64": (302, 261), "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    "gettimeofday": (96, 169), "time": (201, None), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
    # threads
    "clone": (56, 220), "futex": (202, 98), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "rseq": (334, 293),
    # a program's own signals
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "rt_sigpending": (127, 136),
    "sigaltstack": (131, 132), "alarm": (37, None), "pause": (34, None),
    "getitimer": (36, 102), "setitimer": (38, 103),
    # files, to read; what is open already
    "open": (2, None), "openat": (257, 56), "close": (3, 57), "read": (0, 63), "write": (1, 64),
    "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "lseek": (8, 62),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "fcntl": (72, 25), "ioctl": (16, 29),
    "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72),
}
"""(x86_64, aarch64); None where an architecture has no such call."""
# fmt: on

CLONE_THREAD = 0x10000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ONE_OF: dict[str, tuple[int, tuple[int, ...]]] = {
    # Limits of this process: of another, one of the same user's could be changed.
    "prlimit64": (0, (0,)),
    # Not F_SETOWN and F_SETSIG, which send any signal to any process of the same user's.
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),  # duplicates and flags
    # Not FIOSETOWN, for the same reason, nor TIOCSTI.
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # is it a terminal? flags
}
"""Call: index of an argument, and what it may be."""
ALL_OF = {"clone": (0, CLONE_THREAD)}
"""Call: index of an argument, and the bits that it must have."""
NONE_OF = {"open": (1, WRITING), "openat": (2, WRITING)}
"""Call: index of an argument, and the bits that it must not have."""

ALLOW, KILL = 0x7FFF0000, 0x80000000
"""SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS"""
UNKNOWN, REFUSED = 0x50000 | errno.ENOSYS, 0x50000 | errno.EPERM
"""SECCOMP_RET_ERRNO: not listed; listed, with other arguments."""
X32 = 0x40000000
"""Calls of the x32 ABI have other numbers under the same architecture."""
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
"""Offsets in struct seccomp_data."""

Instruction = tuple[int, int, int, int]
"""Operation, how many instructions to skip if true and if false, operand: struct sock_filter."""


@functools.cache
def program_filter(machine: str) -> bytes:
    """An array of struct sock_filter. `KeyError` for a machine whose numbers are not known."""
    architecture = AUDIT_ARCHITECTURES[machine]
    column = [*AUDIT_ARCHITECTURES].index(machine)
    code = [
        *(_load(ARCHITECTURE_AT), _equal(architecture, 1, 0), _return(KILL)),
        *(_load(NUMBER_AT), _at_least(X32, 0, 1), _return(UNKNOWN)),
    ]
    for name, numbers in NUMBERS.items():
        number = numbers[column]
        if number is not None:
            verdict = [*_verdict(name)]
            code += [_equal(number, 0, len(verdict)), *verdict]
    code.append(_return(UNKNOWN))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _verdict(name: str) -> Iterator[Instruction]:
    """What is decided of a call that is listed. Arguments are of 32 bits, little-endian."""
    if name in ONE_OF:
        index, allowed = ONE_OF[name]
        yield _load(ARGUMENTS_AT + 8 * index)
        for passed, value in enumerate(allowed):
            yield _equal(value, len(allowed) - passed, 0)
        yield _return(REFUSED)
    elif name in ALL_OF:
        index, bits = ALL_OF[name]
        yield from (_load(ARGUMENTS_AT + 8 * index), _has_any(bits, 1, 0), _return(REFUSED))
    elif name in NONE_OF:
        index, bits = NONE_OF[name]
        yield from (_load(ARGUMENTS_AT + 8 * index), _has_any(bits, 0, 1), _return(REFUSED))
    yield _return(ALLOW)


def _load(offset: int) -> Instruction:
    return 0x20, 0, 0, offset


def _equal(value: int, if_true: int, if_false: int) -> Instruction:
    return 0x15, if_true, if_false, value


def _at_least(value: int, if_true: int, if_false: int) -> Instruction:
    return 0x35, if_true, if_false, value


def _has_any(bits: int, if_true: int, if_false: int) -> Instruction:
    return 0x45, if_true, if_false, bits


def _return(verdict: int) -> Instruction:
    return 0x06, 0, 0, verdict

"""The filter, run as the kernel runs it: what is not a Python program's business is refused."""

from __future__ import annotations

import os
import struct

import pytest

from megatron_srpo.rewards.seccomp import (
    ALLOW,
    AUDIT_ARCHITECTURES,
    CLONE_THREAD,
    KILL,
    NUMBERS,
    REFUSED,
    UNKNOWN,
    program_filter,
)

MACHINES = pytest.mark.parametrize("machine", AUDIT_ARCHITECTURES)


def verdict(code: bytes, number: int, *arguments: int, architecture: int) -> int:
    """Classic BPF, those instructions that the filter has."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = [*struct.iter_unpack("=HBBI", code)]
    at = accumulator = 0
    while True:
        operation, if_true, if_false, operand = instructions[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif operation == 0x06:
            return operand
        else:
            holds = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }[operation]
            at += if_true if holds else if_false


def of(machine: str, name: str | int, *arguments: int) -> int:
    number = name if isinstance(name, int) else NUMBERS[name][machine == "aarch64"]
    assert number is not None
    architecture = AUDIT_ARCHITECTURES[machine]
    return verdict(program_filter(machine), number, *arguments, architecture=architecture)


@MACHINES
def test_what_an_interpreter_needs_is_allowed(machine: str):
    plain = [name for name in NUMBERS if name not in ("clone", "fcntl", "ioctl")]
    for name in plain:
        if NUMBERS[name][machine == "aarch64"] is not None:
            assert of(machine, name, 0, 0, 0) == ALLOW, name


@MACHINES
def test_threads_are_made_and_processes_are_not(machine: str):
    assert of(machine, "clone", CLONE_THREAD | 0x3D0F00) == ALLOW
    assert of(machine, "clone", 17) == REFUSED
    assert of(machine, 435) == UNKNOWN, "clone3, whose flags lie in memory"


@MACHINES
@pytest.mark.parametrize(
    "flags, expected",
    [
        (os.O_RDONLY | os.O_CLOEXEC, ALLOW),
        (os.O_RDONLY | os.O_DIRECTORY, ALLOW),
        (os.O_WRONLY, REFUSED),
        (os.O_RDWR, REFUSED),
        (os.O_RDONLY | os.O_CREAT, REFUSED),
        (os.O_RDONLY | os.O_TRUNC, REFUSED),
        (os.O_TMPFILE | os.O_WRONLY, REFUSED),
    ],
)
def test_files_are_opened_to_read_only(machine: str, flags: int, expected: int):
    assert of(machine, "openat", 2**32 - 100, 0x7000, flags) == expected
    if machine == "x86_64":
        assert of(machine, "open", 0x7000, flags) == expected


@MACHINES
def test_only_harmless_settings_of_descriptors_and_limits_pass(machine: str):
    for command, expected in (
        (1, ALLOW),
        (1030, ALLOW),
        (8, REFUSED),
        (10, REFUSED),
        (15, REFUSED),
    ):
        assert of(machine, "fcntl", 3, command) == expected
    for request, expected in (
        (0x5401, ALLOW),
        (0x5451, ALLOW),
        (0x5412, REFUSED),
        (0x8901, REFUSED),
    ):
        assert of(machine, "ioctl", 3, request) == expected
    assert of(machine, "prlimit64", 0, 7) == ALLOW
    assert of(machine, "prlimit64", 4711, 7) == REFUSED


@MACHINES
def test_whatever_is_not_listed_does_not_exist(machine: str):
    listed = {numbers[machine == "aarch64"] for numbers in NUMBERS.values()}
    assert {of(machine, n) for n in range(1000) if n not in listed} == {UNKNOWN}


def test_dangerous_calls_of_x86_64_are_not_listed():
    dangerous = {
        "socket": 41, "connect": 42, "socketpair": 53, "shmget": 29, "fork": 57, "vfork": 58,
        "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234, "ptrace": 101,
        "unlink": 87, "rename": 82, "truncate": 76, "setsid": 112, "setuid": 105, "chroot": 161,
        "mount": 165, "setns": 308, "unshare": 272, "memfd_create": 319, "bpf": 321,
        "process_vm_readv": 310, "pidfd_open": 434, "io_uring_setup": 425, "openat2": 437,
        "prctl": 157, "perf_event_open": 298, "open_by_handle_at": 304,
    }  # fmt: skip
    assert {name for name, n in dangerous.items() if of("x86_64", n) != UNKNOWN} == set()


def test_another_architecture_s_calls_end_the_program():
    i386 = 0x40000003
    assert verdict(program_filter("x86_64"), 39, architecture=i386) == KILL
    assert of("x86_64", 0x40000000 + 39) == UNKNOWN


def test_a_machine_without_numbers_has_no_filter():
    with pytest.raises(KeyError):
        program_filter("riscv64")

"""Whatever a program tries, it gets nothing, ends in time, and leaves nothing."""

from __future__ import annotations

import functools
import marshal
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_srpo.rewards import inside, sandbox
from megatron_srpo.rewards.root_folder import FOLDER, LEVELS, PYTHON, Level
from megatron_srpo.rewards.sandbox import Limits, checked, run, strongest
from megatron_srpo.rewards.supervise import CHUNK_BYTES, END_S, Run, SandboxError
from megatron_srpo.types import InputError
from tests.unit.hostile import PREAMBLE, PROGRAMS, Hostile

LIMITS = Limits(wall_s=2.0, memory_mb=256, output_mb=1)
DEADLINE_S = 20.0
"""Of one run, on a machine that does other things; what stays is stopped after 2 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stakes:
    """What programs try to get hold of."""

    token: str
    """In the environment, in a file; no program may say it, no file be called so."""
    folder: Path
    preamble: str


@pytest.fixture(scope="module")
def stakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stakes]:
    token = f"token-{secrets.token_hex(8)}"
    folder = tmp_path_factory.mktemp("stakes")
    file = folder / "secret"
    file.write_text(token)
    abstract = "\0" + token
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as nameless,
        pytest.MonkeyPatch.context() as patch,
    ):
        unix.bind(str(folder / "socket"))
        nameless.bind(abstract)
        for each in (unix, nameless):
            each.listen()
        patch.setenv("SECRET", token)
        preamble = PREAMBLE.format(
            token="to" + "ken-" + token[6:],
            parent=os.getpid(),
            file=str(file),
            home=str(Path.home()),
            repo=str(Path(__file__).parents[2]),
            port=tcp.getsockname()[1],
            unix=str(folder / "socket"),
            abstract=abstract,
        )
        yield Stakes(token=token, folder=folder, preamble=preamble)


def source(hostile: Hostile, stakes: Stakes) -> str:
    packages = str(Path(np.__file__).parents[1])
    return stakes.preamble + hostile.program.replace("{packages!r}", repr(packages))


def attacked(name: str, level: Level, stakes: Stakes) -> Run:
    start = time.monotonic()
    ran = run(source(PROGRAMS[name], stakes), level=level, limits=LIMITS, until=start + DEADLINE_S)
    assert time.monotonic() < start + DEADLINE_S + END_S
    return ran


def sandboxed() -> dict[int, int]:
    """Processes of all sandboxes on this machine: who started, or adopted, the first of each."""
    command: dict[int, bytes] = {}
    parent: dict[int, int] = {}
    for number in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            command[number] = Path(f"/proc/{number}/cmdline").read_bytes()
            status = Path(f"/proc/{number}/stat").read_text()
        except OSError:
            continue
        parent[number] = int(status.rpartition(")")[2].split()[1])
    closed = {number for number, words in command.items() if bytes(FOLDER / "inside.py") in words}

    def owner(number: int) -> int:
        return owner(parent[number]) if parent[number] in closed else parent[number]

    return {number: owner(number) for number in closed if number in parent}


def strays() -> list[int]:
    """Processes of this one's sandboxes, and of those whose trainer is gone."""
    who = sandboxed().items()
    return [number for number, owner in who if owner == os.getpid() or not is_python(owner)]


def has_begun(number: int) -> bool:
    try:
        return "Seccomp:\t2" in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def is_python(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
    except OSError:
        return False


def assert_contained(name: str, ran: Run, stakes: Stakes) -> None:
    said = (ran.output + ran.errors).decode(errors="replace")
    assert "ESCAPED" not in said, said[:2000]
    assert "SyntaxError" not in said and "NameError" not in said, said[:2000]
    assert len(said) <= LIMITS.output_mb * 2**20 + 2 * CHUNK_BYTES
    assert PROGRAMS[name].end in (None, ran.end), (ran.end, said[:2000])
    places = ("/tmp", "/var/tmp", "/dev/shm", "/", Path.home(), os.getcwd(), stakes.folder)
    assert not [p for place in places for p in os.listdir(place) if stakes.token in p]
    assert (stakes.folder / "secret").read_text() == stakes.token


def all_attacked(level: Level, stakes: Stakes) -> dict[str, Run]:
    """All programs, four at a time."""
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda name: attacked(name, level, stakes), PROGRAMS)
        return dict(zip(PROGRAMS, runs, strict=True))


@functools.cache
def is_offered(level: Level) -> bool:
    try:
        return run("print('yes')", level=level).output == b"yes\n"
    except (SandboxError, OSError):
        return False


OFFERED = [level for level in LEVELS if is_offered(level)]
WEAKER = [level for level in OFFERED if level != strongest()]
on_every_level = pytest.mark.parametrize("level", OFFERED)


# --- hostile programs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(stakes: Stakes) -> dict[str, Run]:
    return all_attacked(OFFERED[0], stakes)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_contained(name: str, runs: dict[str, Run], stakes: Stakes):
    assert_contained(name, runs[name], stakes)


def test_no_process_stays(runs: dict[str, Run]):
    assert len(runs) >= 40
    assert strays() == []


@pytest.mark.slow
@pytest.mark.parametrize("level", WEAKER)
def test_hostile_programs_are_contained_on_a_weaker_level(level: Level, stakes: Stakes):
    for name, ran in all_attacked(level, stakes).items():
        assert_contained(name, ran, stakes)
    assert strays() == []


@pytest.mark.parametrize("level", WEAKER)
@pytest.mark.parametrize(
    "name", ["fork bomb", "thread bomb", "disk filler", "secret file", "environment", "tcp"]
)
def test_the_worst_is_contained_on_a_weaker_level(level: Level, name: str, stakes: Stakes):
    assert_contained(name, attacked(name, level, stakes), stakes)


def test_without_a_sandbox_hostile_programs_get_what_they_want(stakes: Stakes):
    """So the tests above look for the right thing."""
    harmless = [name for name, hostile in PROGRAMS.items() if hostile.is_harmless]

    def said(name: str) -> bytes:
        command = [PYTHON, "-c", source(PROGRAMS[name], stakes)]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stdout

    with ThreadPoolExecutor(4) as pool:
        said_by = dict(zip(harmless, pool.map(said, harmless), strict=True))
    assert [name for name, words in said_by.items() if b"ESCAPED" not in words] == []


@on_every_level
def test_a_killed_trainer_leaves_no_program(level: Level):
    program = (
        "from megatron_srpo.rewards.sandbox import Limits, run; run('import time; "
        f"time.sleep(60)', level={level!r}, limits=Limits(wall_s=60))"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as trainer:
        while not [n for n, owner in sandboxed().items() if owner == trainer.pid and has_begun(n)]:
            assert trainer.poll() is None
            time.sleep(0.01)
        trainer.kill()
    end = time.monotonic() + 10
    while strays() and time.monotonic() < end:
        time.sleep(0.01)
    assert strays() == []


# --- honest programs -----------------------------------------------------------------------------

HONEST = {
    "reads and prints": ("print(sum(map(int, input().split())))", "1 2 3\n", "6\n"),
    "reads by number": ("print(open(0).read()[::-1], end='')", "abc", "cba"),
    "reads by name": ("print(open('/dev/stdin').read(), end='')", "abc", "abc"),
    "has no arguments": ("import sys; print(len(sys.argv), __name__)", "", "1 __main__\n"),
    "leaves": ("print(1); exit()", "", "1\n"),
    "recurses in a thread with a large stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(2**27)\n"
        "def deep(n): return 0 if n == 0 else 1 + deep(n - 1)\n"
        "t = threading.Thread(target=lambda: print(deep(10**5))); t.start(); t.join()",
        "",
        "100000\n",
    ),
    "recurses through C": (
        "from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n and f(n - 1) + 1\n"
        "print(f(20000))",
        "",
        "20000\n",
    ),
    "takes memory": ("x = bytearray(2**28); print(len(x))", "", "268435456\n"),
    "has data classes": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nprint(A())",
        "",
        "A(x=1)\n",
    ),
    "prints much": ("print('x\\n' * 10**6, end='')", "", "x\n" * 10**6),
    "reads much": ("import sys; print(len(sys.stdin.read()))", "x" * 10**6, "1000000\n"),
    "has an alarm": (
        "import signal\nsignal.signal(signal.SIGALRM, lambda *_: print('now'))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()",
        "",
        "now\n",
    ),
    "knows the world's letters": ("print(input()[::-1])", "äλ", "λä\n"),
}


@on_every_level
def test_honest_programs_do_what_they_should(level: Level):
    for name, (program, given, expected) in HONEST.items():
        ran = run(program, given.encode(), level=level)
        assert (ran.ended_well, ran.output.decode()) == (True, expected), (name, ran.errors)


@on_every_level
def test_a_set_of_strings_has_one_order(level: Level):
    program = "print({str(i) for i in range(20)})"
    assert run(program, level=level).output == run(program, level=level).output


@on_every_level
@pytest.mark.parametrize(
    "program",
    [
        "def f(a, b): return [a, (b, {'k': None})]",
        "class Solution:\n    def f(self, a, b): return [a, (b, {'k': print('x', flush=True)})]",
        "class Solution: pass\ndef f(a, b): return [a, (b, {'k': None})]",
        "def f(a, b): return [a, (b, {'k': None})]\nif __name__ == '__main__': f(input())",
    ],
)
def test_a_functions_result_comes_as_json(level: Level, program: str):
    ran = run(program, b'[1, 2]\n"x"', level=level, function="f")
    assert (ran.ended_well, ran.output) == (True, b'[[1, 2], ["x", {"k": null}]]'), ran.errors


@pytest.mark.parametrize(
    "program, word",
    [
        ("1 / 0", b"ZeroDivisionError"),
        ("if:", b"SyntaxError"),
        ("x = bytearray(2**40)", b"MemoryError"),
        ("raise SystemExit(3)", b""),
        ("import megatron_srpo", b"ModuleNotFoundError"),
        ("import os; os.abort()", b""),
    ],
)
def test_a_program_that_fails_has_not_ended_well(program: str, word: bytes):
    ran = run(program, level=OFFERED[0])
    assert ran.end == "exit" and not ran.ended_well and word in ran.errors


def test_a_test_s_input_cannot_be_changed_for_those_who_read_it_again():
    stdin = b"x" * 100
    assert run("import os; os.lseek(0, 50, 0)", stdin, level=OFFERED[0]).ended_well
    assert run("print(len(input()))", stdin, level=OFFERED[0]).output == b"100\n"


# --- levels --------------------------------------------------------------------------------------


def test_a_level_that_the_machine_does_not_offer_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "strongest", lambda: "namespaces")
    assert checked("namespaces") == checked("limits") == "namespaces"
    with pytest.raises(InputError, match="sandbox=bubblewrap: this machine offers namespaces only"):
        checked("bubblewrap")
    monkeypatch.setattr(sandbox, "strongest", lambda: None)
    with pytest.raises(InputError, match="sandbox=limits: no sandbox works on this machine"):
        checked("limits")


def test_the_strongest_level_that_works_is_in_use(monkeypatch: pytest.MonkeyPatch):
    assert strongest() == OFFERED[0]
    monkeypatch.setenv("PATH", "/nowhere")
    assert strongest.__wrapped__() == next(x for x in OFFERED if x != "bubblewrap")


def test_without_landlock_nothing_runs_in_the_machine_s_own_root_folder(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(inside, "_only_read", lambda paths: False)
    monkeypatch.setattr(inside, "_limit", lambda job: None)
    monkeypatch.setattr(inside, "_call", lambda *_: 0)
    with open(os.memfd_create("job"), "w+b") as job:
        marshal.dump({"level": "limits", "paths": []}, job)
        job.seek(0)
        with pytest.raises(OSError, match="this kernel has no Landlock"):
            inside.main(os.dup(job.fileno()), 1)


def test_a_sandbox_that_cannot_be_closed_runs_nothing(monkeypatch: pytest.MonkeyPatch):
    """A filter that the kernel refuses."""
    monkeypatch.setattr(sandbox, "program_filter", lambda machine: b"\xff" * 8)
    for level in OFFERED:
        with pytest.raises(SandboxError, match="Invalid argument"):
            run("print('ran')", level=level)

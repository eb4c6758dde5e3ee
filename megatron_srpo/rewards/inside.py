"""What runs in a sandbox: a bare interpreter that gives up its rights, then runs the program.

`sandbox.py` starts it by path: it may import the standard library only, and of that little, since
it is started for every test (`typing` and `signal` would cost a third of its start). The order
matters: what cannot be taken back comes first, and the program last.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import os
import resource
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SIGKILL = 9
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION, CAP_DAC_READ_SEARCH = 0x20080522, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_RIGHTS = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15}
"""linux/landlock.h: so many rights concern files, by the interface's version; 16 since 5."""
READ_FILE, READ_DIR = 4, 8
NOBODY = 65534
"""The user where the machine maps no other."""
STACK_BYTES = 100 * 2**20
NUM_FILES = 64
RECURSION_LIMIT = 50_000
"""As LiveCodeBench sets it."""

LIBC = ctypes.CDLL(None, use_errno=True)


def main(job_fd: int, ready_fd: int) -> None:
    """Reads the job, says one byte when nothing can be taken back any more, runs the program.

    The program has standard input, output and error, and no other descriptor; in place of
    standard output a function's result does.
    """
    with open(job_fd, "rb") as file:
        job: dict[str, Any] = marshal.load(file)
    _limit(job)
    _call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    has_own_root = job["level"] != "limits"
    if not _only_read(job["paths"]) and not has_own_root:
        raise OSError("this kernel has no Landlock: nothing would hide the machine's files")
    if os.geteuid() == 0:
        _become(job["user"], keeps_reading=not has_own_root)
    _call(LIBC.prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    os.closerange(3, ready_fd)
    os.closerange(ready_fd + 1, 2**20)
    _filter(job["filter"])
    os.write(ready_fd, b"\n")
    os.close(ready_fd)
    _run(job["program"], job["prelude"], job["function"])


def _call(function: Any, *arguments: Any) -> int:
    """Raises `OSError` where a call of the C library returns -1."""
    result = function(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")
    return result


def _limit(job: dict[str, Any]) -> None:
    """A process may have so much; there will be one."""
    cpu_s = int(job["wall_s"]) + 1
    for kind, most in (
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_NPROC, job["num_threads"] + _num_counted(job["level"])),
        (resource.RLIMIT_NOFILE, NUM_FILES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _num_counted(level: str) -> int:
    """Threads that count against a new user's limit before the program has made one.

    A namespace counts its own; a user that root becomes has none. At level `limits` all threads
    of an ordinary user count.
    """
    if level != "limits" or os.geteuid() == 0:
        return 0
    num = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                num += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it ended
            continue
    return num


def _only_read(paths: list[str]) -> bool:
    """Landlock: no file is opened but what lies under `paths`, to read. False where the kernel has
    none."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = ctypes.c_uint64((1 << LANDLOCK_RIGHTS.get(version, 16)) - 1)
    rules = _call(LIBC.syscall, LANDLOCK_CREATE, ctypes.byref(rights), 8, 0)
    for path in paths:
        allowed = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        beneath = os.open(path, os.O_PATH)
        rule = (allowed).to_bytes(8, sys.byteorder) + beneath.to_bytes(4, sys.byteorder)
        _call(LIBC.syscall, LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(beneath)
    _call(LIBC.syscall, LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return True


def _become(user: int, *, keeps_reading: bool) -> None:
    """Root becomes a user without rights: limits on processes bind no root.

    The saved user stays root, so that a root without capabilities, as bubblewrap is, may send it
    the signal of its parent's death. In the machine's own root folder the interpreter may be
    readable by root only (`keeps_reading`): what else could be read so is Landlock's to refuse.
    """
    os.setgroups([])
    try:
        os.setresgid(user, user, user)
        os.setresuid(user, user, 0)
    except OSError:  # a container that maps few users
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    kept = keeps_reading << CAP_DAC_READ_SEARCH
    _call(LIBC.capset, header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0))


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog of linux/filter.h"""

    _fields_ = (("num_instructions", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter(code: bytes) -> None:
    program = _FilterProgram(len(code) // 8, code)
    _call(LIBC.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def _run(program: str, prelude: str, function: str | None) -> None:
    """Without a function the program is the main module. With one its definitions come from a
    module of another name, and what it prints goes to standard error."""
    # What `site` defines, which a bare interpreter does not load.
    builtins.exit = builtins.quit = sys.exit
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.argv[:] = ["program.py"]
    module = ModuleType("__main__" if function is None else "program")
    sys.modules[module.__name__] = module
    result_fd = os.dup(1)
    if function is None:
        os.close(result_fd)
    else:
        os.dup2(2, 1)
    exec(prelude, module.__dict__)
    exec(compile(program, "program.py", "exec"), module.__dict__)
    if function is not None:
        _answer(module.__dict__, function, result_fd)


def _answer(defined: dict[str, Any], function: str, result_fd: int) -> None:
    """Calls the method of a class Solution, or the function; arguments come as JSON, one a line,
    and the result goes as JSON."""
    import json

    arguments = [json.loads(line) for line in sys.stdin.read().splitlines() if line.strip()]
    solution = defined.get("Solution")
    method = None if solution is None else getattr(solution(), function, None)
    result = (method or defined[function])(*arguments)
    with open(result_fd, "w") as out:
        json.dump(result, out)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""What of this machine does a program under test see?   -> the command that starts it

The interpreter, its standard library, the C library; nothing of it can be written. At level
`limits` the root folder is the machine's, and Landlock lets the same be read.
"""

from __future__ import annotations

import functools
import marshal
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Level = Literal["bubblewrap", "namespaces", "limits"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""Strongest first."""
FOLDER = Path(__file__).parent
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
"""Not a virtual environment's."""
PYTHON_FLAGS = ("-s", "-S", "-P", "-B", "-X", "utf8")
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
"""Where the C library is, and what the standard library is linked with."""
PACKAGES = ("site-packages", "dist-packages")
STDIN = "/dev/stdin"
NOBODY = "65534"
CAP_SYS_ADMIN = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """What a sandbox is started with, beside standard input, output and error."""

    job: int
    """What `inside.py` reads."""
    ready: int
    """Where it says that the sandbox is closed."""
    info: int
    """Where bubblewrap and `namespaces.py` say which process they started."""
    stdin: int
    """Once more, for a file of that name."""

    def all(self) -> tuple[int, int, int, int]:
        """For `subprocess`'s `pass_fds`."""
        return self.job, self.ready, self.info, self.stdin


def command(level: Level, fds: Descriptors) -> list[str]:
    """Starts a program at a level. Raises `FileNotFoundError` where bubblewrap is not installed."""
    bare = [PYTHON, *PYTHON_FLAGS]
    inside = [*bare, str(FOLDER / "inside.py"), str(fds.job), str(fds.ready)]
    if level == "limits":
        return inside
    if level == "bubblewrap":
        return [*_bubblewrap(fds), "--", *inside]
    links = [path for path in SYSTEM if os.path.islink(path)]
    specification = {
        "is_admin": _is_admin(),
        "readable": readable(),
        "hidden": _hidden(),
        "links": [(path, os.readlink(path)) for path in links],
        "files": [(STDIN, fds.stdin)],
    }
    start = [str(FOLDER / "namespaces.py"), str(os.getpid()), str(fds.info)]
    return [*bare, *start, marshal.dumps(specification).hex(), *inside]


def _bubblewrap(fds: Descriptors) -> Iterator[str]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise FileNotFoundError("bwrap is not installed")
    yield from (bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts")
    if _is_admin():  # `inside.py` becomes another user
        yield from ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield from ("--unshare-user", "--uid", NOBODY, "--gid", NOBODY)
    for path in _above(readable()):  # which bubblewrap would make for their owner only
        yield from ("--dir", path)
    for path in readable():
        yield from ("--ro-bind", path, path)
    for path in _hidden():
        yield from ("--tmpfs", path, "--remount-ro", path)
    for path in filter(os.path.islink, SYSTEM):
        yield from ("--symlink", os.readlink(path), path)
    yield from ("--file", str(fds.stdin), STDIN, "--remount-ro", "/")
    yield from ("--die-with-parent", "--as-pid-1", "--info-fd", str(fds.info))


@functools.cache
def readable() -> tuple[str, ...]:
    """Folders and files that a program may read, at the places that they have on this machine."""
    library = sysconfig.get_config_var("INSTSONAME") or ""
    paths = [
        *(path for path in SYSTEM if not os.path.islink(path)),
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix}),
        str(Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib", library)),
        PYTHON,
        str(FOLDER / "inside.py"),
    ]
    kept: list[str] = []
    for path in filter(os.path.exists, map(os.path.realpath, paths)):
        if not any(Path(path).is_relative_to(above) for above in kept):
            kept.append(path)
    return tuple(kept)


@functools.cache
def rules(level: Level) -> list[str]:
    """What Landlock lets be read: it only allows, so in the machine's own root folder each entry
    beside the installed packages is named."""
    if level != "limits":
        return [*readable(), STDIN]
    paths: list[str] = []
    for path in readable():
        hidden = [each for each in _hidden() if Path(each).is_relative_to(path)]
        assert all(Path(each).parent == Path(path) for each in hidden), f"packages deep in {path}"
        beside = [str(each) for each in Path(path).iterdir()] if hidden else [path]
        paths += [each for each in beside if each not in hidden]
    return paths


def _above(paths: Iterable[str]) -> list[str]:
    """The folders that lead to paths, outermost first."""
    return sorted({str(folder) for path in paths for folder in Path(path).parents} - {"/"})


def _hidden() -> list[str]:
    """Folders of installed packages beside the standard library."""
    beside = (Path(sysconfig.get_path("stdlib")).resolve() / name for name in PACKAGES)
    return [str(path) for path in beside if path.is_dir()]


@functools.cache
def _is_admin() -> bool:
    """May this process mount without a user namespace of its own?"""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return os.geteuid() == 0 and bool(int(status["CapEff"], 16) & CAP_SYS_ADMIN)

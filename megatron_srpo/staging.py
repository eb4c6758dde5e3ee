"""A folder or file that is whole or not there: written under another name, then renamed.

What a disk refuses is one line: of a run, an alarm that names the path (`on_disk`).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from megatron_srpo.types import AlarmError, InputError

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up",
        errno.EFBIG: "a file may not grow that large"}  # fmt: skip
WORDS = FULL | {errno.EROFS: "it can only be read", errno.EACCES: "it may not be written to"}
LEFT = re.compile(r"\.[0-9a-f]{8}\.partial")
"""Behind a folder's name, while it is being filled."""


def check_free(out: Path) -> None:
    """Raises `InputError` where no new folder can be made."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; name a new folder")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{out}: {parent} is no folder that can be written to")


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """`<out>.<8 digits>.partial`, new and empty, to be filled; it becomes `out`, on disk, if
    nothing is raised, and is removed if anything is. Only what kills the process leaves it.

    A full disk is an `InputError`.
    """
    check_free(out)
    # Not `mkdtemp`: that folder, and so the finished one, would be its owner's alone to read.
    partial = out.with_name(f"{out.name}.{secrets.token_hex(4)}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({os.strerror(error.errno or 0)})") from error
    try:
        yield partial
        publish(partial, out)
    except (OSError, RuntimeError, SafetensorError) as error:
        if (number := _error_number(error)) not in FULL:
            raise
        raise InputError(f"{out}: {FULL[number]}; nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def leftovers(out: Path) -> list[Path]:
    """What processes that were killed have left of `staged_folder(out)`, or still fill."""
    found = sorted(out.parent.glob(f"{glob.escape(out.name)}.*.partial"))
    return [path for path in found if LEFT.fullmatch(path.name.removeprefix(out.name))]


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Around all that a run writes: `AlarmError` if the operating system refuses it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, InputError) as error:
        number = _error_number(error)
        if not number:
            raise
        why = WORDS.get(number, os.strerror(number))
        raise AlarmError(
            f"{path} could not be written: {why}; mend that and start again"
        ) from error


def publish(partial: Path, path: Path) -> None:
    """All of a folder on disk, then under its name, and that on disk too."""
    for written in [partial, *partial.rglob("*")]:
        _sync(written)
    partial.rename(path)
    _sync(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """A file, and its folder if need be: whole and on disk, or as it was. `AlarmError` if the disk
    refuses it."""
    partial = path.with_name(path.name + ".partial")
    with on_disk(path):
        path.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        _sync(path.parent)


def append_durably(path: Path, content: bytes) -> None:
    """To a file, and on disk. `AlarmError` if the disk refuses it: a part may be there then."""
    with on_disk(path), path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _error_number(error: BaseException) -> int:
    """What the operating system said, if anything, to whoever raised this.

    torch's zip writer stumbles over its own state and hides the cause behind its complaint;
    safetensors has it in words, and so has what came from another process.
    """
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, OSError):
        return error.errno or 0
    said = re.search(r"(?:os error|Errno) (\d+)", str(error))
    return int(said[1]) if said else 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A disk that refuses from a certain moment on: it is full, or a folder can only be read.

For `Attempt`: called in a rank before its work. No file of this process, or of those that it
forks, can grow beyond a page any more (an OSError, as on a full disk: Python ignores the signal),
or no file can be made in a folder, also by root, who gives the right to do so away.
"""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

CAP_DAC_OVERRIDE = 1
VERSION_3 = 0x20080522
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RefusesWhen:
    """From the moment at which `call` (module, function) is called for the n-th time on a rank."""

    module: str
    function: str
    occurrence: int
    rank: int
    read_only: Path | None = None
    """The folder; None: no file grows."""

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        owner = __import__(self.module, fromlist=["_"])
        for name in self.function.split(".")[:-1]:
            owner = getattr(owner, name)
        name = self.function.rpartition(".")[2]
        real, calls = getattr(owner, name), [0]

        def called(*arguments: object, **more: object) -> object:
            calls[0] += 1
            if calls[0] == self.occurrence:
                self._refuse()
            return real(*arguments, **more)

        mock.patch.object(owner, name, called).start()

    def _refuse(self) -> None:
        if self.read_only is None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES, hard))
            os.ftruncate(2, 0)  # room for the last words
            return
        obey_permissions()
        self.read_only.mkdir(exist_ok=True)
        self.read_only.chmod(0o555)


def obey_permissions() -> None:
    """This process, root or not, may write only where the folder says so."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << CAP_DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0, "cannot give away the right to write anywhere"

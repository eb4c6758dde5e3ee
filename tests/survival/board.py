"""What does a rank do at this moment?   a shared page, which outlives whoever wrote on it"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from types import TracebackType

PHASES = (
    "start", "other", "generate", "localize", "suffix", "reward", "journal", "train", "sync",
    "checkpoint", "eval", "wait", "export", "done",
)  # fmt: skip
"""`start`: before the first step; `other`: what no phase of the loop claims."""
SLOT = struct.Struct("=Bxxxxxxxdd")
"""Of a rank: its phase; when it began its first step and when it had done it, on the clock that all
processes share (0: not yet)."""
MAX_RANKS = 16


class Board:
    """Read and written without locks: a byte is written whole."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(SLOT.size * MAX_RANKS))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 0)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._page.close()

    def show(self, rank: int, phase: str) -> None:
        self._page[rank * SLOT.size] = PHASES.index(phase if phase in PHASES else "other")

    def phase(self, rank: int) -> str:
        return PHASES[self._page[rank * SLOT.size]]

    def mark(self, rank: int, *, began: float, done: float) -> None:
        """Of the first step."""
        phase = self._page[rank * SLOT.size]
        SLOT.pack_into(self._page, rank * SLOT.size, phase, began, done)

    def first_step(self, rank: int) -> tuple[float, float]:
        """(when it began, when it was done)"""
        _, began, done = SLOT.unpack_from(self._page, rank * SLOT.size)
        return began, done

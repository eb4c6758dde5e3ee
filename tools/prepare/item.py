"""What is a problem, and what is a set of them?   Also how a row's columns are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""A row of a file of the set's, by column."""
PARTS = ("train", "test")
POOL = "pool"
"""The source of a set that its authors did not divide: `Problems.sources` names it instead of
parts, which are drawn here."""


class LeftOut(Exception):
    """A row that gives no item, for a reason that the set foresees; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row, as training and evaluation read it."""

    prompt: str
    """The question alone, without instructions; choices are its last lines, "A. ..."."""
    answer: str
    """What the reward compares with."""
    id: str = ""
    """The set's own name for it, if it has names."""
    reward: str | None = None
    """None: the set's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """A set: where its rows are, and what becomes of them."""

    hub: str
    """Its name on the Hugging Face hub."""
    sources: Mapping[str, tuple[str, ...]]
    """Patterns of file names, of a folder as the hub has it; the first that fits anything counts.
    By part, or of the `POOL` from which the parts are drawn."""
    columns: tuple[str, ...]
    """Columns that a row must have."""
    more_columns: tuple[str, ...] = ()
    """Columns that are read where they are there."""
    item: Callable[[Row], Item]
    """Raises `LeftOut`, and `ValueError` for content that the set does not have."""
    reward: str
    num_train: int | None = None
    """At most; None: all. A pool must have so many."""
    num_test: int | None = None
    test_share: float | None = None
    """Of a pool: each problem is in the test part with this probability, whatever others there
    are."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What can be written of it."""
        return PARTS if POOL in self.sources else tuple(self.sources)


def text_of(row: Row, column: str) -> str:
    """A text or a number, as text without space around it. `LeftOut` if it is empty; `ValueError`
    if it is something else."""
    content = row.get(column)
    if content is None or content == "":
        raise LeftOut(f"no {column}")
    if not isinstance(content, str | int | float):
        raise ValueError(f"{column!r} must be a text, not {type(content).__name__}")
    if not (text := str(content).strip()):
        raise LeftOut(f"no {column}")
    return text


def fields_of(row: Row, column: str) -> Mapping[str, Any]:
    """A column that has columns of its own; `ValueError` if it has none."""
    content = row.get(column)
    if not isinstance(content, Mapping):
        raise ValueError(f"{column!r} must be an object, not {type(content).__name__}")
    return content

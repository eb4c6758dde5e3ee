"""Which items are kept, in which part, in what order?   rows -> train.jsonl, test.jsonl

A problem's place in the order is a hash of the seed and its text: it depends neither on the order
of the files nor on which other problems there are. Items wait on disk, so that memory holds only a
few bytes of each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from megatron_srpo.types import InputError, question_key
from prepare.files import Source, read_rows
from prepare.item import POOL, Item, LeftOut, Problems

DUPLICATE = "duplicates"
CONFLICT = "same question, another answer"


def key_of(prompt: str) -> bytes:
    """Of one question in other words (`question_key`), the same."""
    return sha256(question_key(prompt).encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class Entry:
    """An item that waits: where its line is, and what decides about it."""

    key: bytes
    place: bytes
    """Of 32 bytes, uniform: its place in the order."""
    answer: bytes
    """Hash of its answer."""
    line: bytes
    """Hash of its line: which of two duplicates stays must not depend on who comes first."""
    reward: str
    offset: int
    length: int

    @property
    def fraction(self) -> float:
        """Uniform from 0 to 1."""
        return int.from_bytes(self.place, "big") / 2**256


@dataclass(slots=True)
class Selection:
    """Fed row by row; counts each row that is not written, by reason."""

    problems: Problems
    seed: int
    spool: BinaryIO
    """Lines wait here, readable too."""
    excluded: frozenset[bytes] = frozenset()
    """Keys of prompts that must not be in any part."""
    num_rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    _entries: dict[str, dict[bytes, Entry]] = field(default_factory=dict)
    _conflicts: set[tuple[str, bytes]] = field(default_factory=set)

    def read(self, source: Source) -> None:
        """All rows of a source. `InputError` names the row that cannot be what it should be."""
        self._entries.setdefault(source.part, {})
        for file in source.files:
            for number, row in enumerate(read_rows(file, self.problems), start=1):
                self.num_rows += 1
                try:
                    self._add(source.part, self.problems.item(row))
                except LeftOut as reason:
                    self.left_out[str(reason)] += 1
                except ValueError as error:
                    raise InputError(f"{file}: row {number}: {error}") from error

    def _add(self, part: str, item: Item) -> None:
        key = key_of(item.prompt)
        if key in self.excluded:
            raise LeftOut("in a file of --without")
        line = _line(item, key)
        entry = Entry(
            key=key,
            place=sha256(f"{self.seed}/".encode() + key).digest(),
            answer=sha256(item.answer.encode("utf-8", "surrogatepass")).digest(),
            line=sha256(line).digest(),
            reward=item.reward or self.problems.reward,
            offset=self.spool.tell(),
            length=len(line),
        )
        same = self._entries[part].get(key)
        if same is not None:
            self.left_out[DUPLICATE] += 1
            if same.answer != entry.answer:
                self._conflicts.add((part, key))
        if same is None or entry.line < same.line:
            self.spool.write(line)
            self._entries[part][key] = entry

    def parts(self, wanted: Sequence[str]) -> Mapping[str, Sequence[Entry]]:
        """Each part in its order. `InputError` if a pool is too small."""
        for part, key in self._conflicts:
            del self._entries[part][key]
        self.left_out[CONFLICT] += len(self._conflicts)
        whole = self._drawn() if POOL in self._entries else self._given()
        limits = {"train": self.problems.num_train, "test": self.problems.num_test}
        parts = {part: whole[part][: limits[part]] for part in wanted}
        num_written, num_whole = (sum(map(len, p.values())) for p in (parts, whole))
        self.left_out["not drawn"] += num_whole - num_written
        return parts

    def _drawn(self) -> dict[str, list[Entry]]:
        pool, share = self._in_order(POOL), self.problems.test_share
        if share is not None:  # the first ones again: the order is that of the places
            num_test = sum(entry.fraction < share for entry in pool)
            return {"train": pool[num_test:], "test": pool[:num_test]}
        num_train, num_test = self.problems.num_train or 1, self.problems.num_test
        if num_test is None:
            raise InputError("--num-test all would leave nothing for train: say how many")
        if len(pool) < num_train + num_test:
            raise InputError(
                f"{len(pool)} items are left, fewer than {num_train} for train and {num_test} for "
                f"test (--num-train, --num-test); {reasons(self.left_out)}"
            )
        return {"train": pool[num_test:], "test": pool[:num_test]}

    def _given(self) -> dict[str, list[Entry]]:
        whole = {part: self._in_order(part) for part in self._entries}
        if "train" in whole and "test" in whole:
            kept = [entry for entry in whole["train"] if entry.key not in self._entries["test"]]
            self.left_out["also in test"] += len(whole["train"]) - len(kept)
            whole["train"] = kept
        return whole

    def _in_order(self, part: str) -> list[Entry]:
        return sorted(self._entries[part].values(), key=lambda entry: entry.place)


def write(
    selection: Selection, parts: Mapping[str, Sequence[Entry]], folder: Path
) -> dict[str, int]:
    """`<part>.jsonl`, and `<part>_<reward>.jsonl` for items of another reward than the set's.
    Returns the number of items by name of file; `InputError` for a part without any of the set's
    own."""
    files: dict[str, list[Entry]] = {}
    for part, entries in parts.items():
        files[f"{part}.jsonl"] = []
        for entry in entries:
            own = entry.reward == selection.problems.reward
            name = f"{part}.jsonl" if own else f"{part}_{entry.reward}.jsonl"
            files.setdefault(name, []).append(entry)
        if not files[f"{part}.jsonl"]:
            raise InputError(f"nothing is left for {part}; {reasons(selection.left_out)}")
    for name, entries in files.items():
        with (folder / name).open("wb") as file:
            for entry in entries:
                selection.spool.seek(entry.offset)
                file.write(selection.spool.read(entry.length))
    return {name: len(entries) for name, entries in files.items()}


def reasons(left_out: Counter[str]) -> str:
    """
    >>> reasons(Counter({"duplicates": 1, "other level": 20, "no answer": 0}))
    'left out: 20 other level, 1 duplicates'
    """
    counted = [f"{count} {reason}" for reason, count in left_out.most_common() if count]
    return f"left out: {', '.join(counted) or 'none'}"


def prompts_of(files: Iterable[Path]) -> Iterator[bytes]:
    """Keys of the prompts in files that were written before."""
    prepared = Problems(
        hub="prepare_data.py",
        sources={},
        columns=("prompt",),
        item=lambda row: Item(prompt=str(row["prompt"]), answer=""),
        reward="",
    )
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        for row in read_rows(file, prepared):
            yield key_of(str(row["prompt"]))


def _line(item: Item, key: bytes) -> bytes:
    digits = key.hex()
    id = f"{item.id}-{digits[:8]}" if item.id else digits[:16]
    row = {"id": id, "prompt": item.prompt, "answer": item.answer}
    return json.dumps(row).encode() + b"\n"

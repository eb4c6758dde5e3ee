"""Small files as the hub has them, and what `tools/prepare_data.py` makes of them."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from prepare_data import main

Rows = Sequence[Mapping[str, Any]]


def write_rows(path: Path, rows: Rows) -> Path:
    """In the format that the file's name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*map(dict, rows)]), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_items(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(path: Path) -> dict[str, str]:
    """By prompt."""
    return {item["prompt"]: item["answer"] for item in read_items(path)}


class Command:
    """`tools/prepare_data.py` in this process, with the folder that it wrote."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = folder / "out"
        self._capsys = capsys

    def __call__(self, *words: object) -> str:
        """The line that it prints."""
        code = main([*map(str, words), "--out", str(self.out)])
        said = self._capsys.readouterr()
        assert (code, said.err) == (0, "")
        return said.out.rstrip("\n")

    def refused(self, *words: object) -> str:
        """The line that it ends with; nothing is left then."""
        code = main([*map(str, words), "--out", str(self.out)])
        said = self._capsys.readouterr()
        assert (code, said.out) == (2, "")
        assert [path for path in self.out.parent.iterdir() if "out" in path.name] == []
        (line,) = said.err.splitlines()
        return line.removeprefix("prepare_data.py: error: ")

    def files(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir())


def problems(numbers: Iterable[int]) -> list[dict[str, str]]:
    """As AceReason-Math has them."""
    return [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in numbers]


def packed(tests: object, pickled: bytes | None = None) -> str:
    """Private tests as LiveCodeBench packs them; `pickled` instead of its pickle of their JSON."""
    content = pickle.dumps(json.dumps(tests)) if pickled is None else pickled
    return base64.b64encode(zlib.compress(content)).decode()


def program(name: str, **columns: Any) -> dict[str, Any]:
    """A problem as LiveCodeBench has it: reads a number, prints its double."""
    return {
        "question_title": f"Title of {name}",
        "question_content": f"Print the double of the number ({name}).",
        "platform": "atcoder",
        "question_id": name,
        "contest_id": "abc400",
        "contest_date": "2025-04-05T00:00:00",
        "starter_code": "",
        "difficulty": "medium",
        "public_test_cases": json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}]),
        "private_test_cases": packed([{"input": "3\n", "output": "6\n", "testtype": "stdin"}]),
        "metadata": "{}",
    } | columns

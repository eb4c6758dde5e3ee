"""Which files hold the rows of a set, and what is in them?   folder, file or hub -> rows"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet

from megatron_srpo.types import InputError
from prepare.item import POOL, Problems, Row

HUB = "hub"
"""What `--from` says where the files are to be downloaded."""
FORMATS = (".parquet", ".jsonl", ".json", ".csv")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ROWS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one part, or of the pool."""

    part: str
    files: Sequence[Path]


def find(problems: Problems, path: Path, parts: Sequence[str]) -> list[Source]:
    """What there is of the set in a folder, or the one file: `InputError` if that lacks what
    `parts` are made of. The other part comes along if it is there: the two must share nothing."""
    if path.is_dir():
        return _in_folder(problems, path, parts)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    return [Source(_part_of(problems, path, parts), [path])]


def _in_folder(problems: Problems, folder: Path, parts: Sequence[str]) -> list[Source]:
    found: list[Source] = []
    for source, patterns in problems.sources.items():
        matches = (sorted(folder.rglob(pattern)) for pattern in patterns)
        if files := next(filter(None, matches), []):
            found.append(Source(source, files))
        elif source == POOL or source in parts:
            raise InputError(
                f"{folder}: no file named {' or '.join(patterns)} in it, as {problems.hub} has"
            )
    return found


def _part_of(problems: Problems, file: Path, parts: Sequence[str]) -> str:
    """A set with one source; or by the name of the file; or the only part that is asked for."""
    if len(problems.sources) == 1:
        return next(iter(problems.sources))
    fitting = [part for part, names in problems.sources.items() if any(map(file.match, names))]
    if len(fitting) == 1:
        part = fitting[0]
    elif len(parts) == 1:
        part = parts[0]
    else:
        raise InputError(f"{file}: is it train or test? Say which (--split), or name the folder")
    if list(parts) != [part]:
        raise InputError(f"{file}: holds the {part} part alone; name the folder, or --split {part}")
    return part


def download(problems: Problems) -> Path:
    """The set's files from the hub, as a folder: those of the table, no code. `InputError` where
    the hub or the set cannot be reached."""
    from huggingface_hub import snapshot_download

    names = chain.from_iterable(problems.sources.values())
    patterns = [pattern for name in names for pattern in (name, f"*/{name}")]
    try:
        folder = snapshot_download(problems.hub, repo_type="dataset", allow_patterns=patterns)
    except OSError as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"--from hub: {problems.hub} could not be downloaded ({cause}); download its files "
            "where there is a network, and give their folder"
        ) from error
    return Path(folder)


def read_rows(file: Path, problems: Problems) -> Iterator[Row]:
    """Row by row, with the columns that the set wants. `InputError` names file, row and column, or
    says what is wrong with the file."""
    if file.suffix not in FORMATS:
        raise InputError(f"{file}: must end in one of {', '.join(FORMATS)}")
    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(
                f"{file}: is git-lfs's pointer to the file, not the file: `git lfs pull`"
            )
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, problems)
        return
    readers = {".jsonl": _lines, ".json": _json_rows, ".csv": _csv_rows}
    number = 0
    try:
        for number, row in enumerate(readers[file.suffix](file), start=1):
            if not isinstance(row, Mapping):
                raise InputError(f"{file}: row {number} is no object")
            _check_columns(f"{file}: row {number}", row, problems)
            yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: behind row {number} is no UTF-8 text ({error})") from error


def _lines(file: Path) -> Iterator[Any]:
    # Not universal newlines: a text may hold a lone carriage return.
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(line, f"{file}: line {number}")


def _json_rows(file: Path) -> Iterator[Any]:
    """An array of rows; or a row a line, which others also call JSON."""
    with file.open(encoding="utf-8") as opened:
        is_array = opened.read(64).lstrip().startswith("[")
    if not is_array:
        return _lines(file)
    return iter(_parsed(file.read_text("utf-8"), str(file)))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error})") from error


def _csv_rows(file: Path) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as opened:
        try:
            yield from csv.DictReader(opened, strict=True)
        except csv.Error as error:
            raise InputError(f"{file}: not readable as CSV ({error})") from error


def _parquet_rows(file: Path, problems: Problems) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _check_columns(str(file), names, problems)
            wanted = [*problems.columns, *problems.more_columns]
            columns = [name for name in wanted if name in names]
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        cause = str(error).strip().splitlines()[0]
        raise InputError(f"{file}: not readable as parquet ({cause})") from error


def _check_columns(where: str, there: Sequence[str] | Row, problems: Problems) -> None:
    missing = [name for name in problems.columns if name not in there]
    if missing:
        raise InputError(
            f"{where} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, there)) or 'none'}. Is it a file of {problems.hub}?"
        )

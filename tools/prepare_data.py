"""Public sets of problems -> the project's JSONL (docs/data.md).

    python tools/prepare_data.py NAME --from PATH [--out FOLDER] [--split train|test] [--seed 42]

PATH is a file or folder as the hub has it (parquet, JSONL, JSON, CSV), downloaded by you, or `hub`:
downloaded now. FOLDER, data/NAME by default, must be new; train.jsonl and test.jsonl appear in it
whole or not at all. One line says what became of every row. Exit code 2 for what is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from prepare.files import HUB, download, find
from prepare.item import PARTS, Problems
from prepare.selection import Selection, prompts_of, reasons, write
from prepare.table import SETS

from megatron_srpo.exit_codes import REFUSED
from megatron_srpo.staging import check_free, staged_folder
from megatron_srpo.types import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        print(_prepare(arguments))
    except InputError as error:
        print(f"prepare_data.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    return 0


def _prepare(arguments: argparse.Namespace) -> str:
    name, problems = arguments.name, _resized(arguments)
    out = arguments.out or Path("data") / name
    parts = problems.parts if arguments.split is None else (arguments.split,)
    check_free(out)
    excluded = frozenset(prompts_of(arguments.without))
    folder = download(problems) if arguments.source == HUB else Path(arguments.source)
    sources = find(problems, folder, parts)
    with staged_folder(out) as partial:
        lines = partial / "lines"
        with lines.open("w+b") as spool:
            selection = Selection(problems, arguments.seed, spool, excluded)
            for source in sources:
                selection.read(source)
            counts = write(selection, selection.parts(parts), partial)
        lines.unlink()
    written = ", ".join(f"{file} {count}" for file, count in counts.items())
    num_files = sum(len(source.files) for source in sources)
    return (
        f"{out}: {written}; read {selection.num_rows} rows of {num_files} files; "
        f"{reasons(selection.left_out)}"
    )


def _resized(arguments: argparse.Namespace) -> Problems:
    """The set, with the sizes that are given. `InputError` for a part that it does not have."""
    problems = SETS[arguments.name]
    sizes = {
        key: value for key, value in vars(arguments).items() if key in ("num_train", "num_test")
    }
    if "train" not in problems.parts and (arguments.split == "train" or "num_train" in sizes):
        raise InputError(f"{arguments.name} is for evaluation only: it has no train part")
    return replace(problems, **sizes)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prepare_data.py", description="Public sets of problems as JSONL.")
    parser.add_argument("name", choices=SETS, metavar="NAME", help=", ".join(SETS))
    parser.add_argument(
        "--from", dest="source", required=True, metavar="PATH", help="file, folder, or hub"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new; default data/NAME")
    parser.add_argument("--split", choices=PARTS, help="write this part only")
    parser.add_argument("--seed", type=int, default=42, help="of the draw and the order")
    for size in ("--num-train", "--num-test"):
        parser.add_argument(
            size, type=_size, default=argparse.SUPPRESS, metavar="N", help="at most; or all"
        )
    parser.add_argument(
        "--without", type=Path, nargs="+", default=[], metavar="FILE.jsonl",
        help="leave out the prompts of these files, written before",
    )  # fmt: skip
    return parser


def _size(word: str) -> int | None:
    if word == "all":
        return None
    if not word.isdigit() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is neither a positive number nor all")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())

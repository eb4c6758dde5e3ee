"""The table of math answers, equal and unequal: read, graded, written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_srpo.protocols import Reward
from megatron_srpo.rewards.math_string import math_string
from megatron_srpo.rewards.math_verify import math_verify
from tests.unit.builders import prompt

FILE = Path(__file__).with_suffix(".tsv")
GRADERS: dict[str, Reward] = {"math_verify": math_verify, "math_string": math_string}
COLUMNS = ("trap", "gold", "answer", "equal", *GRADERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One line of the table; its remarks say what is equal."""

    trap: str
    gold: str
    answer: str
    equal: str
    """yes, no"""
    math_verify: str
    """yes, no, none: what it said when the table was written"""
    math_string: str

    @property
    def response(self) -> str:
        boxed = rf"So it is $\boxed{{{self.answer}}}$."
        return self.answer if self.trap == "box" else boxed


def pairs() -> list[Pair]:
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    assert tuple(lines[0].split("\t")) == COLUMNS
    cells = (line.split("\t") for line in lines[1:])
    return [Pair(**dict(zip(COLUMNS, each, strict=True))) for each in cells]


def said(grader: str, pair: Pair) -> str:
    """yes, no, none"""
    score = GRADERS[grader](prompt(answer=pair.gold), pair.response)
    return "none" if score.failure else "yes" if score.correct else "no"


def write(table: list[Pair]) -> None:
    """The remarks stay as they are."""
    remarks = [line for line in FILE.read_text().splitlines() if line.startswith("#")]
    lines = ["\t".join(str(getattr(pair, column)) for column in COLUMNS) for pair in table]
    FILE.write_text("\n".join([*remarks, "\t".join(COLUMNS), *lines, ""]))

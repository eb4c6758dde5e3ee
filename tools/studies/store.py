"""Finished runs, one a line of benchmarks/claims/<regime>.jsonl: what is there is not run again.

Lines are only added, each in one write, so that several processes and branches may add to a file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.studies.regimes import REGIMES


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that is wanted."""

    regime: str
    settings: tuple[str, ...]
    """Sorted overrides: the method and its learning rate, `key=value`."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is kept of a run. Lists have an entry for each evaluation; those of training metrics one
    for each interval between two, None where there was no such rollout."""

    job: Job
    step: list[int]
    tokens: list[int]
    """Generated until then."""
    passed: list[float]
    """Held-out pass@1."""
    base: list[float | None]
    """Pass rate of base rollouts that are trained ..."""
    fresh: list[float]
    """... and of all fresh ones."""
    suffix: list[float | None]
    exact: list[float | None]
    """Localization: share that names the first wrong thought ..."""
    clean: list[float | None]
    """... or an earlier one."""
    depth: dict[str, list[int]]
    """Thought that was reset to -> suffixes from clean prefixes, right ones of them; from erroneous
    ones, right ones."""
    kinds: dict[str, int]
    """Generated tokens by what for."""
    seconds: dict[str, float]
    """By phase."""
    length: float
    """Mean of the last evaluation's responses, tokens."""
    mismatch: float
    """Largest difference between trainer and engine, nats."""
    commit: str = ""


class Store:
    """The regimes' files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = {record.job: record for record in self._read()}

    def _read(self) -> Iterator[Record]:
        for name in REGIMES:  # other files there hold no runs
            path = self.folder / f"{name}.jsonl"
            lines = path.read_text("utf-8").splitlines() if path.exists() else []
            yield from map(parse, lines)

    @property
    def records(self) -> Collection[Record]:
        return self._records.values()

    def get(self, job: Job) -> Record | None:
        return self._records.get(job)

    def add(self, record: Record) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{record.job.regime}.jsonl").open("a", encoding="utf-8") as file:
            file.write(dump(record))
        self._records[record.job] = record


def dump(record: Record) -> str:
    """One line."""
    values = asdict(record)
    job = values.pop("job")
    return json.dumps(job | values, separators=(",", ":")) + "\n"


def parse(line: str) -> Record:
    """Of `dump`."""
    values = json.loads(line)
    job = Job(
        regime=values.pop("regime"),
        settings=tuple(values.pop("settings")),
        seed=values.pop("seed"),
    )
    return Record(job=job, **values)

"""Kills in every phase of a run, each followed by the same command again, until the run is done.

    python -m tests.survival.matrix [--kills 60] [--seed 0] [--out benchmarks/kills.json]

Real engines, a tiny policy, 6 steps. Afterwards every file of the journal and of the trained
policy and all metrics but times, speeds and memory are those of a run of the same layout that was
left alone, nothing else is left in its folder, and nothing that was in the journal was drawn again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.survival.kills import Hit, Kill, plan, strike
from tests.survival.launcher import Attempt

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 process": (1, []),
    "2 replicas": (2, []),
    "TP2, engine of 2": (2, ["parallel.tp=2", "rollout.tp=2"]),
    "1 process, synchronous saves": (1, ["checkpoint.asynchronous=false"]),
}
"""Processes and overrides."""
PHASES = (
    "generate", "checkpoint", "localize", "journal", "train", "suffix", "sync", "reward", "eval",
    "start", "wait", "export",
)  # fmt: skip
WORTH_MENTIONING_S = 1e-3
"""Where no checkpoint is due, its phase is shorter."""
IN_A_RUN = 6
"""Kills, before it may finish."""
UNSTABLE = ("time/", "speed/", "memory/")
REWARD = """
import time
from megatron_srpo.types import Score


def parity(prompt, response):
    time.sleep(0.002)
    return Score(value=float(len(response) % 2), correct=bool(len(response) % 2))
"""
"""Gives a random policy a gradient, and takes a time in which it can be hit."""


def write_run(folder: Path) -> Path:
    """Policy, data and config; returns the config's path."""
    from tests.e2e.small_run import write_small_run

    (folder / "slow_parity.py").write_text(REWARD)
    return write_small_run(
        folder,
        num_steps=6,
        reward=f"{folder}/slow_parity.py:parity",
        reward_workers=1,  # so that there is something to wait for
        optimizer={"lr": 3e-4, "eps": 1e-3, "warmup_steps": 3, "decay": "linear"},
        loss={"kl_coef": 0.1},
        checkpoint={"every": 2},
        retention={"data": str(folder / "demonstrations.jsonl")},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a finished run has left, as far as it must not depend on kills."""

    names: list[str]
    """Of all files but the log."""
    hashes: dict[str, str]
    """SHA-256 of journal and trained policy."""
    metrics: list[dict[str, float]]

    @classmethod
    def of(cls, run: Path) -> Left:
        files = sorted(path for path in run.rglob("*") if path.is_file())
        hashed = [f for part in ("rollouts", "hf") for f in files if f.is_relative_to(run / part)]
        return cls(
            names=[str(file.relative_to(run)) for file in files if file.name != "log.txt"],
            hashes={
                str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in hashed
            },
            metrics=[
                {name: x for name, x in json.loads(line).items() if not name.startswith(UNSTABLE)}
                for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()
            ],
        )

    def differences(self, other: Left) -> list[str]:
        """In words; none if all is equal."""
        found = [f"only one has {name}" for name in sorted({*self.names} ^ {*other.names})]
        for name in self.hashes.keys() & other.hashes.keys():
            if self.hashes[name] != other.hashes[name]:
                found.append(f"{name} differs")
        steps = [[line["step"] for line in left.metrics] for left in (self, other)]
        if steps[0] != steps[1]:
            return [*found, f"lines of metrics for steps {steps[0]}, not {steps[1]}"]
        for mine, right in zip(self.metrics, other.metrics, strict=True):
            names = sorted(mine.keys() | right.keys())
            wrong = [name for name in names if mine.get(name) != right.get(name)]
            found += [f"step {mine['step']}: {', '.join(wrong)}"] if wrong else []
        return found


@dataclass(slots=True)
class Ground:
    """A layout: its run that was left alone, and those that are killed."""

    name: str
    folder: Path
    config: Path
    right: Left = field(init=False)
    usual: list[dict[str, float]] = field(init=False)
    """Of each rank: seconds, by phase, in the run that was left alone."""
    seconds: float = field(init=False)
    """That it took."""
    num_killed: int = field(default=0, init=False)
    """Runs."""

    def __post_init__(self) -> None:
        with self.start("alone", 0) as attempt:
            codes = attempt.finish()
            assert not any(codes), f"{codes}\n{attempt.said()}"
            self.seconds = time.monotonic() - attempt.began
        self.right = Left.of(self.run("alone"))
        said = sorted((self.folder / "alone.said").glob("*.phases.jsonl"))
        self.usual = [_usual(path) for path in said]

    def run(self, name: str) -> Path:
        return self.folder / name

    def start(
        self,
        run: str,
        number: int,
        *more: str,
        prepare: Callable[[int], None] | None = None,
    ) -> Attempt:
        """The command, for the so-manieth time; `more`: overrides."""
        ranks, overrides = LAYOUTS[self.name]
        command = ["train", str(self.config), f"run_dir={self.run(run)}", *overrides, *more]
        return Attempt(self.folder / f"{run}.said", number, ranks, command, prepare)

    def kill_run(self, run: str, kills: Sequence[Kill]) -> tuple[list[Hit], list[str]]:
        """(what was hit, before the run was done; what is wrong with what it has left)"""
        hits: list[Hit] = []
        journalled: list[set[int]] = []
        for number in range(len(kills) + 1):
            journalled.append(whole_steps(self.run(run) / "rollouts"))
            with self.start(run, number) as attempt:
                if number < len(kills):
                    checkpoints = self.run(run) / "checkpoints"
                    hit = strike(attempt, kills[number], self.usual, checkpoints)
                    if hit is not None:
                        hits.append(hit)
                        continue
                codes = attempt.finish()
                if any(codes):
                    return hits, [f"start {number} ended with {codes}:\n{attempt.said()}"]
                break
        drawn = (self.folder / f"{run}.said" / "drawn.jsonl").read_text().splitlines()
        again = [
            f"start {row['attempt']} drew {row['requests']} of step {row['step']} again"
            for row in map(json.loads, drawn)
            if row["purpose"] != "eval" and row["step"] in journalled[row["attempt"]]
        ]
        return hits, again + Left.of(self.run(run)).differences(self.right)

    def kill_until_hit(self, wanted: Sequence[Kill]) -> Iterator[tuple[int, list[Hit], list[str]]]:
        """(number of the run, what was hit, what is wrong with what it has left), until every kill
        has hit. One that comes too late, for a phase that a run has once, is wanted in the next."""
        left, last = list(wanted), self.num_killed + len(wanted) + 3
        while left:
            assert self.num_killed < last, f"{self.name}: {left} do not come"
            number = self.num_killed
            self.num_killed += 1
            tried = left[:IN_A_RUN]
            hits, wrong = self.kill_run(f"killed{number}", tried)
            del left[: len(hits)]
            if len(hits) < len(tried):  # the phase is shorter than in the run that was left alone
                left[0] = replace(left[0], fraction=left[0].fraction / 4)
            yield number, hits, wrong


def _usual(phases: Path) -> dict[str, float]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for phase, each in map(json.loads, phases.read_text().splitlines()):
        if each > WORTH_MENTIONING_S:
            seconds[phase].append(each)
    return {phase: statistics.median(of) for phase, of in seconds.items()}


def whole_steps(rollouts: Path) -> set[int]:
    """Steps of which the journal has the parts of all replicas."""
    parts: dict[tuple[int, int], int] = defaultdict(int)
    for path in rollouts.glob("*.jsonl"):
        name = re.fullmatch(r"(\d+)-\d+-of-(\d+)\.jsonl", path.name)
        assert name, path
        parts[int(name[1]), int(name[2])] += 1
    return {step for (step, replicas), found in parts.items() if found == replicas}


def kill_all(
    grounds: Sequence[Ground], num: int, *, seed: int, phases: Sequence[str] = PHASES
) -> list[dict[str, Any]]:
    """`num` kills, divided among the grounds; each with whether its run was as if left alone."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    for index, ground in enumerate(grounds):
        share = num * (index + 1) // len(grounds) - num * index // len(grounds)
        ranks, _ = LAYOUTS[ground.name]
        wanted = plan(phases, share, ranks=ranks, rng=rng)
        for run, hits, wrong in ground.kill_until_hit(wanted):
            found += [
                {"layout": ground.name, "run": run, **asdict(hit), "wrong": wrong} for hit in hits
            ]
            for each in wrong:
                print(f"{ground.name}, run {run}: {each}", flush=True)
            if wrong and not hits:
                break
    return found


def table(found: Iterable[dict[str, Any]]) -> str:
    """Markdown: tried and survived, by phase that was hit and by layout."""
    rows = list(found)
    layouts = sorted({row["layout"] for row in rows}, key=list(LAYOUTS).index)
    phases = [p for p in (*PHASES, "other", "done") if any(row["phase"] == p for row in rows)]

    def cell(of: list[dict[str, Any]]) -> str:
        return f"{len(of)} / {sum(not row['wrong'] for row in of)}" if of else ""

    lines = [f"| phase | {' | '.join(layouts)} | all |", "|---" * (len(layouts) + 2) + "|"]
    for phase in [*phases, None]:
        hit = [row for row in rows if phase in (None, row["phase"])]
        cells = [cell([row for row in hit if row["layout"] == layout]) for layout in layouts]
        lines.append(f"| {phase or 'all'} | {' | '.join(cells)} | {cell(hit)} |")
    return "\n".join(lines)


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = [row["seconds_to_step"] for row in found if row["seconds_to_step"]]
    loops = [row["seconds_to_loop"] for row in found if row["seconds_to_step"]]
    ends: dict[str, int] = defaultdict(int)
    for row in found:
        for end in row["others"]:
            ends[end] += 1
    return {
        "kills": len(found),
        "survived": sum(not row["wrong"] for row in found),
        "of_one_rank": sum(row["victim"] is not None for row in found),
        "while_a_checkpoint_was_written": sum(row["was_saving"] for row in found),
        "seconds_from_start_to_first_step_done": _quartiles(steps),
        "of_these_until_it_began": _quartiles(loops),
        "how_the_others_ended": dict(sorted(ends.items())),
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return [round(x, 2) for x in statistics.quantiles(values, n=4)] if len(values) > 1 else []


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills in every phase of a run.")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="a folder that stays")
    arguments = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        found, seconds = run_matrix(work, arguments.layouts, arguments.kills, arguments.seed)
    report = {
        "command": f"python -m tests.survival.matrix --kills {arguments.kills} "
        f"--seed {arguments.seed}",
        "commit": commit,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "seconds": round(seconds),
        **summary(found),
        "hits": found,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(found))
    print(json.dumps({k: v for k, v in report.items() if k != "hits"}, indent=1))


def run_matrix(
    work: Path, layouts: Sequence[str], num: int, seed: int, phases: Sequence[str] = PHASES
) -> tuple[list[dict[str, Any]], float]:
    """(kills, seconds that all took)"""
    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    config = write_run(work)
    grounds = []
    for index, name in enumerate(layouts):
        folder = work / f"layout{index}"
        folder.mkdir()
        grounds.append(Ground(name, folder, config))
    found = kill_all(grounds, num, seed=seed, phases=phases)
    return found, time.monotonic() - began


if __name__ == "__main__":
    main()

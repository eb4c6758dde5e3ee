"""Jobs of the stand-in (`stand_in.py`): 2 nodes x 2 tasks, each in a folder of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.slurm.cluster import AS_IN_A_CGROUP, Cluster, wait_for

ROOT = Path(__file__).parents[2]
RANKS = range(4)
STAND_IN = Path(__file__).with_name("stand_in.py")
PROGRAM = f'{AS_IN_A_CGROUP} "{sys.executable}" "{STAND_IN}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job of the stand-in, in a folder of its own; names have spaces wherever they may."""

    cluster: Cluster
    folder: Path
    words: tuple[str, ...]
    """Of sbatch."""
    number: str

    def submit_again(self) -> Job:
        return replace(self, number=self.cluster.submit(*self.words, folder=self.folder))

    def lines(self, name: str, rank: int) -> list[str]:
        path = self.folder / "run" / f"{name}-{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_step(self, step: int, *, attempt: int = 0) -> None:
        line = f"{attempt} {step}"
        for rank in RANKS:
            wait_for(f"{self.folder.name}: {line}", lambda r=rank: line in self.lines("steps", r))

    def finish(self, *, seconds: float = 60) -> Outcome:
        record = self.cluster.finish(self.number, seconds=seconds)
        return Outcome(job=self, state=record["JobState"], exit_code=record["ExitCode"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    job: Job
    state: str
    exit_code: str
    """CODE:SIGNAL of the batch script."""

    @property
    def steps(self) -> list[list[int]]:
        """Of each rank, in order; one that was done twice is there twice."""
        return [[int(line.split()[1]) for line in self.job.lines("steps", r)] for r in RANKS]

    @property
    def attempts(self) -> int:
        return len({line.split()[0] for line in self.job.lines("steps", 0)})

    @property
    def signals(self) -> list[list[str]]:
        return [self.job.lines("signals", rank) for rank in RANKS]

    @property
    def said(self) -> str:
        (log,) = self.job.folder.glob(f"*-{self.job.number}.log")
        return log.read_text()

    def check(self, *, state: str, exit_code: str, attempts: int) -> None:
        found = (self.state, self.exit_code, self.attempts)
        assert found == (state, exit_code, attempts), self.said

    def check_whole(self, *, steps: int, attempts: int) -> None:
        """Done, each step on each rank exactly once."""
        self.check(state="COMPLETED", exit_code="0:0", attempts=attempts)
        assert self.steps == [list(range(steps))] * len(RANKS), self.said


def begin(
    cluster: Cluster,
    folder: Path,
    *words: str,
    site: str | None = "",
    options: tuple[str, ...] = (),
    script: str = "train.sbatch",
) -> Job:
    """`site`: lines for the site file; None: there is none."""
    scripts, work = folder / "slurm here", folder / "my work"
    shutil.copytree(ROOT / "slurm", scripts, ignore=shutil.ignore_patterns("site.sh"))
    work.mkdir()
    if site is not None:
        (scripts / "site.sh").write_text(f"TASKS_PER_NODE=2\nMEGATRON_SRPO=({PROGRAM})\n{site}\n")
    own = ("-N2", "--exclusive", "-J", folder.name)
    words = (*options, f"../slurm here/{script}", str(work / "c d.yaml"), *words)
    words = (*own, *words)
    return Job(
        cluster=cluster, folder=work, words=words, number=cluster.submit(*words, folder=work)
    )


Scenario = Callable[[Cluster, Path], Outcome]
Outcomes = dict[Scenario, Future[Outcome]]


@contextmanager
def played(scenarios: Sequence[Scenario], cluster: Cluster, folder: Path) -> Iterator[Outcomes]:
    """All side by side: nearly all of their time is Slurm's own waiting."""
    with ThreadPoolExecutor(len(scenarios)) as pool:
        yield {play: pool.submit(play, cluster, folder / play.__name__) for play in scenarios}

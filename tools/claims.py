"""The project's claims, tested on its own loop.

    python tools/claims.py [--only STUDY ...] [--regimes NAME ...] [--seeds A:B] [--jobs 2]

Every run spends one regime's budget of generated tokens on one method with one seed; what is left
of it is a line of benchmarks/claims/<regime>.jsonl, and what has a line is not run again: stop it
and start it as you like.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.studies import plan  # noqa: E402
from tools.studies.regimes import REGIMES  # noqa: E402
from tools.studies.store import Job, Store  # noqa: E402
from tools.studies.table import STUDIES  # noqa: E402

FOLDER = ROOT / "benchmarks/claims"
RUNS_A_PROCESS = 16
"""Then another takes its place: engines of past runs stay in memory."""
UNKNOWN_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=[*STUDIES], metavar="STUDY")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=[*REGIMES])
    parser.add_argument("--seeds", default="0:10", help="FIRST:END")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    os.chdir(ROOT)
    store = Store(FOLDER)
    chosen = {"only": arguments.only, "regimes": arguments.regimes}
    for jobs in plan.stages(store, seeds=range(int(first), int(end)), **chosen):
        work(jobs, store, num_processes=arguments.jobs)


def work(jobs: Sequence[Job], store: Store, *, num_processes: int) -> None:
    """Does them in this order and adds them to the store."""
    if not jobs:
        return
    each = statistics.fmean(expected_seconds(job, store) for job in jobs)
    print(f"{len(jobs)} runs, {each:.0f} s each: {each * len(jobs) / num_processes / 60:.0f} min")
    for name in dict.fromkeys(job.regime for job in jobs):
        REGIMES[name].prepare()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    context = get_context("forkserver")
    context.set_forkserver_preload(["tools.studies.runs"])
    begun = time.monotonic()
    with ProcessPoolExecutor(
        num_processes, context, initializer=os.nice, initargs=(10,), max_tasks_per_child=RUNS_A_PROCESS
    ) as pool:
        futures = [pool.submit(do, job) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            store.add(replace(record, commit=commit))
            job, took = record.job, (time.monotonic() - begun) / number
            print(
                f"{number}/{len(jobs)}  {job.regime} seed {job.seed}  {' '.join(job.settings)}  "
                f"pass@1 {record.passed[0]:.2f} -> {record.passed[-1]:.2f}  "
                f"{record.seconds['step']:.0f} s  {took * (len(jobs) - number) / 60:.0f} min left",
                flush=True,
            )


def do(job: Job):
    """In a process that has imported what a run needs."""
    from tools.studies.runs import do

    return do(job)


def expected_seconds(job: Job, store: Store) -> float:
    """By the runs of its regime that are there."""
    known = [r.seconds["step"] for r in store.records if r.job.regime == job.regime]
    return statistics.fmean(known) if known else UNKNOWN_S


if __name__ == "__main__":
    main()

"""The project's claims, tested on its own loop.

    python tools/claims.py [--only STUDY ...] [--regimes NAME ...] [--seeds FIRST:END] [--jobs 2]
    python tools/claims.py --page     what is there, as docs/claims.md and pictures
    python tools/claims.py --quick    SRPO against RRPO, in minutes; the page stays as it is

A run spends one regime's budget of generated tokens on one method with one seed; what is left of it
is a line of benchmarks/claims/REGIME.jsonl. What has a line is not run again, so stop it and start
it as you like. `tools/studies/table.py` says what is compared, and in which order. The study
`gradients` makes no runs: it measures the gradients that arms learn from, once, when the others are
done; `tools/studies/gradients.py` says how.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.studies import alignment, plan  # noqa: E402
from tools.studies.comparison import comparison, runs_of  # noqa: E402
from tools.studies.page import write_page  # noqa: E402
from tools.studies.regimes import REGIMES  # noqa: E402
from tools.studies.store import Job, Record, Store  # noqa: E402
from tools.studies.table import QUICK, QUICK_SEEDS, SEEDS, STUDIES  # noqa: E402

FOLDER = ROOT / "benchmarks/claims"
GRADIENTS = "gradients"
STUDY_NAMES = [*STUDIES, GRADIENTS]
PAGE = ROOT / "docs/claims.md"
RUNS_A_PROCESS = 16
"""Then another takes its place: engines of past runs stay in memory."""
UNKNOWN_S = 30.0
"""A run takes so long where none is known yet."""
GRADIENT_S = 15.0
"""So does an arm's gradient, where none is known, ..."""
REFERENCE_S = 60.0
"""... and a reference, with the training to get there."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*STUDIES, GRADIENTS], default=[*STUDIES, GRADIENTS]
    )
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=[*REGIMES])
    parser.add_argument("--seeds", default=f"0:{SEEDS.stop}", metavar="FIRST:END")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    os.chdir(ROOT)
    store = Store(FOLDER)
    if arguments.quick:
        print(quick(store, ROOT / "runs/claims_quick", num_processes=arguments.jobs))
        return 0
    if arguments.page:
        write_page(store, PAGE, FOLDER)
        return 0
    num_failed = 0
    chosen = {"only": arguments.only, "regimes": arguments.regimes}
    for jobs in plan.stages(store, seeds=range(int(first), int(end)), **chosen):
        num_failed += work(jobs, store, num_processes=arguments.jobs)
        write_page(store, PAGE, FOLDER)
    for regime in arguments.regimes if GRADIENTS in arguments.only else ():
        num_failed += measure_gradients(regime, store, num_processes=arguments.jobs)
        write_page(store, PAGE, FOLDER)
    return 1 if num_failed else 0


def measure_gradients(regime: str, store: Store, *, num_processes: int) -> int:
    """One regime's, in this process; how many runs that tune a learning rate for it have failed."""
    path = alignment.path_in(store.folder)
    cells = alignment.missing(regime, path)
    if not cells:
        return 0
    if len(alignment.STATES[regime]) > 1:  # policies of a GRPO run: with which learning rate?
        sweep = plan.missing(plan.sweep(regime), store)
        if num_failed := work(sweep, store, num_processes=num_processes):
            return num_failed
    known = [each.seconds for each in alignment.read(path).values()]
    num_states = len({each.state for each in cells})
    seconds = len(cells) * (median(known) if known else GRADIENT_S) + num_states * REFERENCE_S
    print(f"{regime}: {len(cells)} gradients, {num_states} policies: {seconds / 60:.0f} min")
    REGIMES[regime].prepare()
    from tools.studies.gradients import measure

    lr = plan.best_lr(regime, store)
    measure(cells, path, lr=lr, commit=head(), tell=partial(print, flush=True))
    return 0


def quick(known: Store, folder: Path, *, num_processes: int) -> str:
    """The table of a few runs, which are kept in `folder`."""
    store, rate = Store(folder), plan.best_lr("h8", known)
    jobs = [plan.job("h8", arm, str(rate), seed) for seed in QUICK_SEEDS for arm in QUICK]
    work(plan.missing(jobs, store), store, num_processes=num_processes)
    by = runs_of(QUICK, "h8", QUICK_SEEDS, store, rate)
    return comparison(by, QUICK[0], REGIMES["h8"])


def work(jobs: Sequence[Job], store: Store, *, num_processes: int) -> int:
    """Does them in this order and adds them to the store; how many failed."""
    if not jobs:
        return 0
    seconds = sum(expected_seconds(job, store) for job in jobs)
    minutes = seconds / num_processes / 60
    print(f"{len(jobs)} runs of {seconds / len(jobs):.0f} s: {minutes:.0f} min", flush=True)
    for name in dict.fromkeys(job.regime for job in jobs):
        REGIMES[name].prepare()
    commit = head()
    begun, num_failed = time.monotonic(), 0
    for number, (job, future) in enumerate(done(jobs, num_processes), 1):
        if (error := future.exception()) is None:
            store.add(replace(future.result(), commit=commit))
            said = in_words(future.result())
        else:
            num_failed += 1
            said = f"failed: {error!r}"
        left = (time.monotonic() - begun) / number * (len(jobs) - number) / 60
        print(
            f"{number}/{len(jobs)}  {job.regime} seed {job.seed}  {' '.join(job.settings)}  "
            f"{said}  {left:.0f} min left",
            flush=True,
        )
    return num_failed


def done(jobs: Sequence[Job], num_processes: int) -> Iterator[tuple[Job, Future[Record]]]:
    """As they end. Processes are replaced all at once: `max_tasks_per_child` may wait for ever
    (CPython issue 115634)."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tools.studies.runs"])
    num = num_processes * RUNS_A_PROCESS
    for first in range(0, len(jobs), num):
        pool = ProcessPoolExecutor(num_processes, context, os.nice, (10,))
        try:
            jobs_of = {pool.submit(do, job): job for job in jobs[first : first + num]}
            for future in as_completed(jobs_of):
                yield jobs_of[future], future
        finally:
            pool.shutdown(cancel_futures=True)  # whoever interrupts waits for the runs in progress


def head() -> str:
    """The commit that is checked out."""
    words = ["git", "rev-parse", "--short=9", "HEAD"]
    return subprocess.check_output(words, text=True).strip()


def do(job: Job) -> Record:
    """In a process that was forked from one that has imported all that a run needs."""
    from tools.studies.runs import do

    return do(job)


def in_words(record: Record) -> str:
    """What became of it, in a line."""
    first, *_, last = record.passed
    return f"pass@1 {first:.2f} to {last:.2f} in {record.seconds['step']:.0f} s"


def expected_seconds(job: Job, store: Store) -> float:
    """By the runs of its regime that are there."""
    known = [r.seconds["step"] for r in store.records if r.job.regime == job.regime]
    return median(known) if known else UNKNOWN_S


if __name__ == "__main__":
    sys.exit(main())

"""What does a sandbox cost?   milliseconds a run, runs a second with eight workers, by level

    python tools/bench_sandbox.py [--runs 100] [--workers 8]

Each run is `print(1)`. `run_ms` is the median time of one run after another on the wall, `cpu_ms`
what supervisor and sandbox compute in it, `cpu_ms_bare` the same of the interpreter without a
sandbox. `runs_per_s` is with that many worker processes at once, `cases_per_s` for a reward whose
program adds two numbers in ten tests. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from megatron_srpo.rewards.code import Code
from megatron_srpo.rewards.root_folder import LEVELS, PYTHON, PYTHON_FLAGS, Level
from megatron_srpo.rewards.sandbox import SandboxError, run, strongest
from megatron_srpo.types import Prompt

NUM_CASES = 10
ANSWER = {"tests": [{"input": f"{n} {n + 1}", "output": str(2 * n + 1)} for n in range(NUM_CASES)]}
RESPONSE = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a sandbox costs.")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 1),
        "runs": arguments.runs,
        "workers": arguments.workers,
        "cpu_ms_bare": cpu_ms_bare(arguments.runs),
        "levels": {},
    }
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        for level in LEVELS:
            try:
                report["levels"][level] = one_after_another(level, arguments.runs)
            except (SandboxError, OSError):
                continue
            shares = [(level, arguments.runs // arguments.workers)] * arguments.workers
            list(pool.map(runs_of, shares))
            began = time.perf_counter()
            num_runs = sum(pool.map(runs_of, shares))
            rate = num_runs / (time.perf_counter() - began)
            report["levels"][level]["runs_per_s"] = round(rate, 1)
        list(pool.map(judged, range(arguments.workers)))
        began = time.perf_counter()
        num_cases = NUM_CASES * sum(pool.map(judged, range(4 * arguments.workers)))
        report["level_of_rewards"] = strongest()
        report["cases_per_s"] = round(num_cases / (time.perf_counter() - began), 1)
    print(json.dumps(report, indent=1))


def cpu_s() -> float:
    """Of this process and of all that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def cpu_ms_bare(num_runs: int) -> float:
    """An interpreter that is started and prints."""
    before = cpu_s()
    for _ in range(num_runs):
        subprocess.run([PYTHON, *PYTHON_FLAGS, "-c", "print(1)"], capture_output=True, check=True)
    return round((cpu_s() - before) / num_runs * 1e3, 1)


def one_after_another(level: Level, num_runs: int) -> dict[str, float]:
    """Raises what a level raises that the machine does not offer."""
    run("print(1)", level=level)
    seconds: list[float] = []
    before = cpu_s()
    for _ in range(num_runs):
        began = time.perf_counter()
        run("print(1)", level=level)
        seconds.append(time.perf_counter() - began)
    return {
        "run_ms": round(statistics.median(seconds) * 1e3, 1),
        "run_ms_tenth_percentile": round(float(np.quantile(seconds, 0.1)) * 1e3, 1),
        "cpu_ms": round((cpu_s() - before) / num_runs * 1e3, 1),
    }


def runs_of(share: tuple[Level, int]) -> int:
    """In a worker."""
    level, num_runs = share
    for _ in range(num_runs):
        assert run("print(1)", level=level).output == b"1\n"
    return num_runs


def judged(number: int) -> int:
    """One response, in a worker; the number of responses that are right."""
    prompt = Prompt(
        id=str(number), text="Add.", token_ids=np.zeros(1, np.int32), answer=json.dumps(ANSWER)
    )
    return int(Code(sandbox="limits", timeout_s=60)(prompt, RESPONSE).correct)


if __name__ == "__main__":
    main()

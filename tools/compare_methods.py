"""GRPO, RRPO and SRPO from one warm start, over paired seeds; and a control that cannot learn.

    python tools/compare_methods.py CONFIG OUT [--seeds 0:7] [--jobs 2] [--override KEY=VALUE ...]

Runs `megatron-srpo train` once per method and seed into OUT, then writes OUT/comparison.json and
prints tables: held-out pass@1 at the end, area under its curve over steps and over generated
tokens, and paired differences. Finished runs are kept, so it can be stopped and started again;
empty OUT after a change of code or config.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

from megatron_srpo.metrics import GENERATED

METHODS = {"grpo": "none", "rrpo": "random", "srpo": "self"}
"""name -> algorithm.resets"""
CONTROL = "control"
"""SRPO with a learning rate of 0: what moves here is noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare methods over paired seeds.")
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0:7", help="FIRST:END")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--override", nargs="*", default=[])
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    seeds = range(int(first), int(end))
    jobs = [(method, seed) for seed in seeds for method in METHODS] + [(CONTROL, seeds[0])]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(lambda job: run(arguments, *job), jobs):
            print(line, flush=True)
    curves = {
        f"{method}/{seed}": curve(folder(arguments.out, method, seed)) for method, seed in jobs
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "curves": curves,
    }
    (arguments.out / "comparison.json").write_text(json.dumps(result, indent=1))
    print(table(curves, list(seeds)))


def folder(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}_seed{seed}"


def run(arguments: argparse.Namespace, method: str, seed: int) -> str:
    run_dir = folder(arguments.out, method, seed)
    if (run_dir / "hf").is_dir():
        return f"{run_dir.name}: kept"
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = [f"algorithm.resets={METHODS.get(method, 'self')}", f"seed={seed}"]
    overrides += ["optimizer.lr=0"] if method == CONTROL else []
    command = [sys.executable, "-m", "megatron_srpo", "train", str(arguments.config)]
    command += [*overrides, *arguments.override, f"run_dir={run_dir}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{run_dir.name}: {done.stderr.strip().splitlines()[-1]}")
    return f"{run_dir.name}: done"


def curve(run_dir: Path) -> dict[str, list[float]]:
    """Held-out pass@1 against updates and against tokens generated until then."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    spent = [0.0, *accumulate(sum(line.get(name, 0.0) for name in GENERATED) for line in lines)]
    points = [
        (line["step"], spent[index], value)
        for index, line in enumerate(lines)
        for name, value in line.items()
        if name.startswith("eval/") and name.endswith("/pass_at_1")
    ]
    steps, tokens, passes = (list(column) for column in zip(*points, strict=True))
    return {"step": steps, "tokens": tokens, "pass_at_1": passes}


def area(xs: list[float], ys: list[float], end: float) -> float:
    """Mean height of the polygon through the points, from its first x to `end`."""
    total, points = 0.0, list(zip(xs, ys, strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= end:
            break
        cut = min(x1, end)
        y_cut = y0 + (y1 - y0) * (cut - x0) / (x1 - x0)
        total += (cut - x0) * (y0 + y_cut) / 2
    return total / (end - xs[0])


def table(curves: dict[str, dict[str, list[float]]], seeds: list[int]) -> str:
    budget = min(c["tokens"][-1] for name, c in curves.items() if not name.startswith(CONTROL))
    measures = {
        "end": lambda c: c["pass_at_1"][-1],
        "AUC per step": lambda c: area(c["step"], c["pass_at_1"], c["step"][-1]),
        "AUC per token": lambda c: area(c["tokens"], c["pass_at_1"], budget),
    }
    rows = [
        f"| method | start | {' | '.join(measures)} | generated tokens |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        mine = [curves[f"{method}/{seed}"] for seed in seeds]
        cells = [spread([measure(c) for c in mine]) for measure in measures.values()]
        start, cost = (
            spread([c["pass_at_1"][0] for c in mine]),
            spread([c["tokens"][-1] for c in mine], 0),
        )
        rows.append(f"| {method} | {start} | {' | '.join(cells)} | {cost} |")
    rows += ["", f"| paired difference | {' | '.join(measures)} |", "|---|---|---|---|"]
    for left, right in (("srpo", "rrpo"), ("srpo", "grpo"), ("rrpo", "grpo")):
        cells = []
        for measure in measures.values():
            gaps = [measure(curves[f"{left}/{s}"]) - measure(curves[f"{right}/{s}"]) for s in seeds]
            cells.append(f"{spread(gaps)} ({sum(gap > 0 for gap in gaps)} of {len(gaps)})")
        rows.append(f"| {left} - {right} | {' | '.join(cells)} |")
    flat = [round(value, 3) for value in curves[f"{CONTROL}/{seeds[0]}"]["pass_at_1"]]
    return "\n".join([*rows, "", f"control, learning rate 0: {flat}"])


def spread(values: list[float], digits: int = 3) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} +- {deviation:.{digits}f}"


if __name__ == "__main__":
    main()

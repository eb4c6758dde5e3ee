"""A check in a process of its own: one has one rollout engine, and may run out of memory.

python -m tools.gpu.apart MODULE:FUNCTION ARGUMENTS    results as one line of JSON, the last
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_srpo.environment import (
    be_one_process_unless_launched,
    set_environment,
    unlaunched,
)
from megatron_srpo.types import InputError
from tools.gpu.result import Result, failed, not_run

ROOT = Path(__file__).resolve().parents[2]
MARK = "RESULTS "


def run_apart(
    name: str, target: str, arguments: dict[str, Any], deadline: float = float("inf")
) -> list[Result]:
    """What the function returns; one failure named `name` if the process ends otherwise, one
    `not_run` if it has not ended by then (`time.monotonic`)."""
    command = [sys.executable, "-m", "tools.gpu.apart", target, json.dumps(arguments)]
    environment = unlaunched() | {"PYTHONPATH": str(ROOT)}
    left = None if deadline == float("inf") else max(1.0, deadline - time.monotonic())
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [not_run(name, f"not done in {left:.0f} s")]
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return [Result(**row) for row in json.loads(lines[-1].removeprefix(MARK))]
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return [failed(name, RuntimeError(f"exit code {done.returncode}: {(said or ['silent'])[-1]}"))]


def main(target: str, arguments: str) -> None:
    """`InputError`: this build or this GPU does not have what was asked for."""
    set_environment()
    be_one_process_unless_launched()
    module, function = target.split(":")
    given = json.loads(arguments)
    try:
        results = getattr(importlib.import_module(module), function)(**given)
    except InputError as lacking:
        results = [not_run(str(given.get("name", function)), str(lacking))]
    print(MARK + json.dumps([asdict(result) for result in results]), flush=True)
    os._exit(0)  # a rollout engine's finalizers take long, and have nothing to say


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What surviving costs while nothing fails: shares of a run's time, from its own metrics.

    python tools/bench_survival.py RUN [RUN ...]

Prints one JSON object: for each run folder the seconds of its steps, what of them training waited
for checkpoints and what the journal took, each as a share of all steps, and of the median step.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "runs": {run: shares(Path(run)) for run in sys.argv[1:]},
    }
    print(json.dumps(report, indent=1))


def shares(run: Path) -> dict[str, Any]:
    """A step's wait for a checkpoint stands in the next step's line."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    steps = [line for line in lines if "time/step_s" in line]
    total = sum(line["time/step_s"] for line in steps)
    found: dict[str, Any] = {
        "steps": len(steps),
        "step_s_median": round(statistics.median(line["time/step_s"] for line in steps), 4),
    }
    for name in ("checkpoint", "journal"):
        seconds = [line.get(f"time/{name}_s", 0.0) for line in steps]
        found[f"{name}_s"] = round(sum(seconds), 3)
        found[f"{name}_share"] = round(sum(seconds) / total, 4)
        found[f"{name}_s_median"] = round(statistics.median(seconds), 5)
    return found


if __name__ == "__main__":
    main()

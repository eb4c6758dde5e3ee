"""What surviving costs while nothing fails: shares of a run's time, from its own metrics.

    python tools/bench_survival.py RUN [RUN ...]

Prints one JSON object: for each run folder the seconds of its steps, what of them training waited
for checkpoints and what the journal took, each as a share of all steps, and of the median step.
And what the guard takes of a core while it listens beside some work, and a point to stop at.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_srpo.colocation import Colocation
from megatron_srpo.config_sections import DeadlineConfig
from megatron_srpo.guard import Guard
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.watchdog import Watchdog


def main() -> None:
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "guard": guard_cost(seconds=10.0),
        "runs": {run: shares(Path(run)) for run in sys.argv[1:]},
    }
    print(json.dumps(report, indent=1))


def guard_cost(*, seconds: float) -> dict[str, float]:
    """Of the thread, by its own clock, and of a point, by the median of many."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mesh: Any = SimpleNamespace(store=store, rank=0, world_size=1, replica=0)
    gpu, dog = Colocation.on(mesh), Watchdog(cfg=DeadlineConfig())
    with Guard(mesh, gpu, dog, folder=RunFolder(Path("."))) as guard:
        (thread,) = (t for t in threading.enumerate() if t.name == "guard")
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        began = time.clock_gettime(clock)
        points: list[float] = []
        deadline = time.monotonic() + seconds
        with gpu.points.section(is_joint=False):
            while time.monotonic() < deadline:
                points.append(timeit.timeit(gpu.points.step, number=1000) / 1000)
                time.sleep(0.01)
        used = time.clock_gettime(clock) - began
    assert guard.asked_by is None
    return {"cpu_share": used / seconds, "point_s_median": statistics.median(points)}


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

"""Stands in for the program in tests of what is around it: its signals and exit codes, no imports.

    stand_in.py train CONFIG [steps=N] [hold=STEP] [end=RANK:STEP:ATTEMPT:CODE]

Each rank does steps, in `run/` beside the config: `steps-RANK` has a line for each, `signals-RANK`
for each signal; it saves after every fifth and when it is asked to stop, which takes a while, and
goes on from there. `hold`: there it waits for a signal, unless it has gone on from anywhere. `end`:
that rank ends with that code after that step of that attempt (*: any).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

rank, attempt = os.environ["RANK"], os.environ.get("SLURM_RESTART_COUNT", "0")
# Some ranks are slower: none may be killed for that.
step_s, save_s = 0.1 + 0.03 * int(rank), 1.5 + 0.3 * int(rank)
given = dict(word.split("=", 1) for word in sys.argv[3:])
settings = {"steps": "10", "hold": "", "end": ""} | given
folder = Path(sys.argv[2]).parent / "run"
folder.mkdir(exist_ok=True)
saved = folder / f"saved-{rank}"
signals: list[float] = []


def append(name: str, line: str) -> None:
    with (folder / f"{name}-{rank}").open("a") as file:
        file.write(line + "\n")


def on_signal(number: int, _: object) -> None:
    signals.append(time.monotonic())
    append("signals", f"{attempt} {signal.Signals(number).name}")
    if signals[-1] - signals[0] > 1:
        os._exit(1)  # the second: leave without saving


signal.signal(signal.SIGUSR1, on_signal)
signal.signal(signal.SIGTERM, on_signal)
launched = {name: os.environ.get(name) for name in (*LAUNCHED, "CUDA_VISIBLE_DEVICES")}
append("starts", json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), **launched}))
is_resumed = saved.exists()
step = int(saved.read_text()) if is_resumed else 0
while step < int(settings["steps"]) and not signals:
    time.sleep(step_s)
    if settings["hold"] == str(step) and not is_resumed:
        continue
    append("steps", f"{attempt} {step}")
    step += 1
    if step % 5 == 0:
        saved.write_text(str(step))
    code = settings["end"].rpartition(":")[2]
    if fnmatch(f"{rank}:{step}:{attempt}:{code}", settings["end"]):
        print(f"ends with {code}")
        sys.exit(int(code))
if signals:
    time.sleep(save_s)
    saved.write_text(str(step))
    sys.exit(75)
print("done")

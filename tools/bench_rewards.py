"""What do rewards cost the trainer?   a stand-in engine's responses -> benchmarks/rewards.json

    python tools/bench_rewards.py [--out FILE] [--seconds 30] [--items 2048]

2,048 math answers, half of them right, at the end of responses of some 2 kB, through the processes
of `rewards/judge.py`, as `roll_out` does it. Two ways to feed them:

at a pace   as an engine gives them that takes `--seconds`: the trainer's own seconds of CPU,
            without those of the stand-in engine, as a share of the wall time, and the wait that is
            left when the last response has come
at once     how many items a second 1, 2 and 8 processes do, and the trainer's CPU for one item
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srpo.environment import set_environment
from megatron_srpo.rewards.judge import RewardJudge, judge_named
from megatron_srpo.rewards.process import Worker
from megatron_srpo.rewards.workers import Workers, ready
from megatron_srpo.types import Prompt, Score

Item = tuple[Prompt, str]
SHAPES: tuple[Callable[[int, int], tuple[str, str, str]], ...] = (
    lambda a, b: (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{2 * a}}}{{{2 * b}}}", f"{a}/{b + 1}"),
    lambda a, b: (f"{a * b}", f"{a * b}.0", f"{a * b + 1}"),
    lambda a, b: (f"({a}, {b}]", rf"\left({a}, {b}\right]", f"[{a}, {b}]"),
    lambda a, b: (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"{b}\sqrt{{{a}+1}}"),
    lambda a, b: (f"x^2+{a}x+{b}", f"{b}+x({a}+x)", f"x^2-{a}x+{b}"),
)
"""(the right answer, the same in other words, a wrong one)"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What rewards cost the trainer.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--items", type=int, default=2048)
    arguments = parser.parse_args()
    set_environment()
    items = answers(arguments.items)
    results: dict[str, Any] = {
        "command": f"python tools/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "commit": said("git", "rev-parse", "HEAD"),
        "hardware": f"{os.cpu_count()} cores that others use too, {platform.machine()}",
        "items": len(items),
        "answers": "math_verify",
        "at_a_pace": at_a_pace(items, arguments.seconds),
        "at_once": {f"{n} processes": at_once(items, n) for n in (1, 2, 8)},
        "one_process": one_process(),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def answers(num: int) -> list[Item]:
    rng = random.Random(0)
    items: list[Item] = []
    for index in range(num):
        right, other, wrong = SHAPES[index % len(SHAPES)](rng.randint(2, 60), rng.randint(2, 60))
        thoughts = " ".join(str(rng.randrange(10**6)) for _ in range(300))
        prompt = Prompt(
            id=f"p{index}",
            text="What is it?",
            token_ids=np.zeros(200, np.int32),
            answer=right,
        )
        items.append((prompt, rf"{thoughts} so \boxed{{{other if index % 2 else wrong}}}."))
    return items


def paced(items: list[Item], seconds: float, done: list[float]) -> Iterator[Item]:
    """Evenly over so many seconds; notes when the last has been given."""
    began = time.perf_counter()
    for index, item in enumerate(items):
        time.sleep(max(0.0, began + seconds * index / len(items) - time.perf_counter()))
        yield item
    done.append(time.perf_counter())


def at_a_pace(items: list[Item], seconds: float) -> dict[str, Any]:
    began = time.process_time()
    for _ in paced(items, seconds, []):
        pass
    alone = time.process_time() - began
    judge, done = judge_named("math_verify", timeout_s=60, num_workers=8), list[float]()
    cpu, wall = time.process_time(), time.perf_counter()
    scores = judge.judge(paced(items, seconds, done))
    wall, waited = time.perf_counter() - wall, time.perf_counter() - done[0]
    cpu = time.process_time() - cpu - alone
    check(scores)
    used = num_workers(judge)
    judge.close()
    return {
        "seconds": round(wall, 2),
        "trainer_cpu_s": round(cpu, 3),
        "trainer_cpu_share": round(cpu / wall, 5),
        "wait_after_the_last_s": round(waited, 3),
        "processes_used": used,
    }


def at_once(items: list[Item], num: int) -> dict[str, float]:
    judge = judge_named("math_verify", timeout_s=60, num_workers=num)
    check(judge.judge(items[: 8 * num]))  # the processes are there
    cpu, wall = time.process_time(), time.perf_counter()
    scores = judge.judge(items)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    check(scores)
    judge.close()
    return {
        "items_per_s": round(len(items) / wall, 1),
        "trainer_cpu_us_per_item": round(1e6 * cpu / len(items), 1),
    }


def check(scores: list[Score]) -> None:
    assert [score.correct for score in scores] == [i % 2 == 1 for i in range(len(scores))]


def num_workers(judge: RewardJudge) -> int:
    (workers,) = judge.rewards
    assert isinstance(workers, Workers)
    return len(workers.idle)


def one_process() -> dict[str, Any]:
    """From nothing to the first answer; and there and back where the answer costs nothing."""
    found: dict[str, Any] = {}
    item = answers(1)[0]
    for name in ("boxed in a process", "math_verify"):
        judge = (
            in_processes("boxed")
            if name != "math_verify"
            else judge_named(name, timeout_s=60, num_workers=1)
        )
        seconds: list[float] = []
        for _ in range(5):
            judge.close()
            began = time.perf_counter()
            judge.judge([item])
            seconds.append(time.perf_counter() - began)
        found[f"{name}: first answer after, s"] = round(statistics.median(seconds), 3)
    judge = in_processes("boxed")
    judge.judge([item])
    (workers,) = judge.rewards
    round_trips: list[float] = []
    for _ in range(2000):
        began = time.perf_counter()
        asked = workers.begin(lambda: None)
        asked.put(*item)
        while not asked.is_done:
            ready(asked.descriptors, within_s=1)
            asked.advance()
        round_trips.append(time.perf_counter() - began)
    found["there and back, us"] = round(1e6 * statistics.median(round_trips), 1)
    return found


def in_processes(name: str) -> RewardJudge:
    """One of those that stay in the trainer otherwise."""
    return RewardJudge(
        [Workers(start=partial(Worker, name, timeout_s=60), role="reward", num_workers=1)]
    )


if __name__ == "__main__":
    main()

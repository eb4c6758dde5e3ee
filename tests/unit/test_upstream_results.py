"""What forked writers of a checkpoint say reaches their rank, and they end with it."""

from __future__ import annotations

import os
import queue
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron_srpo.engines.megatron.upstream import Results, forked_end_with_this

FORK = get_context("fork")


def test_results_are_those_of_the_forked_process_once():
    results = Results()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for number in (1, 2):
        said = {number: list(range(100_000 // number))}
        writer = FORK.Process(target=results.put, args=(said,))
        writer.start()
        writer.join(10)
        assert results.get_nowait() == said
        with pytest.raises(queue.Empty):
            results.get_nowait()


def forks_and_sleeps(pids: Path) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    pids.with_suffix(".partial").write_text(f"{os.getpid()} {child}")
    pids.with_suffix(".partial").rename(pids)
    time.sleep(60)


def is_there(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def rank(pids: Path) -> None:
    with forked_end_with_this():
        FORK.Process(target=forks_and_sleeps, args=(pids,)).start()
    time.sleep(60)


def test_what_a_killed_rank_has_forked_and_what_that_has_are_gone(tmp_path: Path):
    pids = tmp_path / "pids"
    killed = FORK.Process(target=rank, args=(pids,))
    killed.start()
    deadline = time.monotonic() + 20
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert killed.pid is not None
    writers = [int(pid) for pid in pids.read_text().split()]
    assert all(map(is_there, writers))
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    while any(map(is_there, writers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_there, writers))

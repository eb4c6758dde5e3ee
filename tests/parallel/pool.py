"""Processes that live as long as the test session: a job pays for no imports but the first.

A job is a function of a mesh. It runs on the first so many processes, which build their process
groups for it and destroy them after it.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from typing import Any

from megatron_srpo.config_sections import ParallelConfig
from tests.launch import forked

NUM_PROCESSES = 4
PATIENCE_S = 20
"""So long the others may take to notice that one has failed."""


class Pool:
    """One executor per process: which rank runs where is then known."""

    def __init__(self) -> None:
        self._executors: list[ProcessPoolExecutor] = []

    def run(
        self,
        num: int,
        job: Callable[..., Any],
        *arguments: Any,
        rollout_tp: int = 1,
        timeout_s: float = 240,
        **parallel: Any,
    ) -> list[Any]:
        """What the job returned on each of `num` ranks; raises what a failed one raised.

        `parallel` are fields of `ParallelConfig`.
        """
        layout = {"parallel": ParallelConfig(**parallel), "rollout_tp": rollout_tp}
        port = _free_port()
        futures = [
            executor.submit(_on_rank, rank, num, port, layout, job, arguments)
            for rank, executor in enumerate(self._first(num))
        ]
        done, others = wait(futures, timeout=timeout_s, return_when=FIRST_EXCEPTION)
        failed = [future for future in done if future.exception() is not None]
        if failed or others:
            self._give_up_on(others)
        if failed:
            # The others lose their connection to the one that failed first.
            causes = [e for f in failed if "Connection closed" not in str(e := f.exception())]
            raise (causes or [failed[0].exception()])[0]  # type: ignore[misc]
        assert not others, f"{job.__name__} takes longer than {timeout_s} s"
        return [pickle.loads(future.result()) for future in futures]

    def _first(self, num: int) -> list[ProcessPoolExecutor]:
        context = forked()
        while len(self._executors) < num:
            self._executors.append(ProcessPoolExecutor(1, context, initializer=_begin))
        return self._executors[:num]

    def _give_up_on(self, futures: set[Future[Any]]) -> None:
        """Ranks that wait for one that has failed end with it, or are ended."""
        if wait(futures, timeout=PATIENCE_S).not_done:
            self.close()

    def close(self) -> None:
        """Idle processes leave by themselves, with their shared memory; others are ended."""
        processes = [p for executor in self._executors for p in executor._processes.values()]
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        self._executors.clear()
        deadline = time.monotonic() + PATIENCE_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _begin() -> None:
    warnings.simplefilter("ignore")
    import tests.parallel.jobs  # noqa: F401

    gc.freeze()  # what imports have made need not be looked at after each job


def _on_rank(
    rank: int,
    num: int,
    port: int,
    layout: dict[str, Any],
    job: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> bytes:
    """Pickled here: left to multiprocessing, a tensor takes a shared file and a second."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from megatron_srpo.engines.megatron.mesh import build_mesh, destroy_mesh

    mesh = build_mesh(**layout)
    try:
        return pickle.dumps(job(mesh, *arguments))
    finally:
        destroy_mesh()
        _forget_models()


def _forget_models() -> None:
    """Megatron's hooks and caches keep a job's model alive, and with it the threads of its groups,
    which poll: after a number of jobs they would take all the time there is."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    for thing in gc.get_objects():
        if type(thing) is DistributedDataParallel:
            vars(thing).clear()  # autograd holds its hooks, and these hold all the rest
    cached: Any = RotaryEmbedding.forward
    cached.cache_clear()
    gc.collect()

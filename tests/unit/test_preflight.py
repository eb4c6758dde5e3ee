"""A node that is not fit stops the run before anything is built, by name, on all ranks."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_srpo import preflight as preflight_module
from megatron_srpo import shared_folder
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.preflight import (
    Report,
    agree,
    check_all_reduce,
    judge,
    node_name,
    preflight,
    report_here,
    slurm_nodes,
    versions_here,
)
from megatron_srpo.types import AlarmError

VERSIONS = {"python": "3.11.1", "torch": "2.13.0"}


def report(rank: int, **changes: Any) -> Report:
    """Of two ranks a node, n0, n1, ..., with a GPU each."""
    well: dict[str, Any] = {"num_gpus": 2, "free_share": 0.99, "versions": VERSIONS}
    return Report(rank=rank, local_rank=rank % 2, node=f"n{rank // 2}", **well | changes)


def judged(changes: dict[int, dict[str, Any] | None], **arguments: Any) -> list[str]:
    """Of three nodes; None: this rank says nothing."""
    said = {
        r: report(r, **(changes.get(r) or {})) for r in range(6) if changes.get(r, {}) is not None
    }
    return judge(said, world_size=6, **arguments)


def test_nothing_is_wrong_with_nodes_that_are_alike():
    assert judged({}) == []
    without_gpus = {rank: {"num_gpus": 0, "free_share": None} for rank in range(6)}
    assert judged(without_gpus) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({4: {"versions": VERSIONS | {"torch": "2.12.0"}}}, "has torch 2.12.0, others have 2.13.0"),
        ({4: {"versions": VERSIONS | {"vllm": "0.32"}}}, "has vllm 0.32, others have none"),
        ({4: {"versions": {"python": "3.11.1"}}}, "has torch none, others have 2.13.0"),
        ({4: {"num_gpus": 1}, 5: {"num_gpus": 1}}, "has 1 GPUs, others have 2"),
        ({5: {"free_share": 0.12}}, "has GPU 1 with 12% of its memory free, less than 80%"),
        ({5: {"folder": "run_dir=r is ..."}}, "is not fit to write: run_dir=r is ..."),
    ],
)
def test_a_node_that_is_not_like_the_others_is_named_once(changes: dict, problem: str):
    assert judged(changes) == [f"node n2 {problem}"]


def test_most_are_right_and_of_two_halves_the_first():
    old = {"versions": VERSIONS | {"torch": "2.12.0"}}
    assert judged(dict.fromkeys((0, 1), old)) == ["node n0 has torch 2.12.0, others have 2.13.0"]
    said = {rank: report(rank, **(old if rank > 1 else {})) for rank in range(4)}
    assert judge(said, world_size=4) == ["node n1 has torch 2.12.0, others have 2.13.0"]


def test_a_rank_without_a_gpu_of_its_own_is_named():
    few = {rank: {"num_gpus": 1} for rank in range(6)}
    assert judged(few) == [f"node n{n} has 1 GPUs, too few for rank {2 * n + 1}" for n in range(3)]


def test_memory_that_is_just_enough_is_enough():
    assert judged({3: {"free_share": 0.5}}, least_free=0.5) == []
    assert len(judged({3: {"free_share": 0.49}}, least_free=0.5)) == 1


def test_ranks_that_say_nothing_are_named_with_their_node():
    assert judged({3: None}, timeout_s=120.0) == ["node n1 (rank 3) has not answered in 120 s"]
    gone = {2: None, 3: None}
    assert judged(gone) == ["node number 1 (ranks 2, 3) has not answered in 300 s"]
    named = judged(gone, nodes=("n0", "n1", "n2"), timeout_s=0.5)
    assert named == ["node n1 (ranks 2, 3) has not answered in 0.5 s"]


def test_all_that_is_wrong_is_said():
    changes = {1: None, 2: {"num_gpus": 1}, 3: {"num_gpus": 1}, 5: {"free_share": 0.0}}
    assert [line.split()[1] for line in judged(changes)] == ["n0", "n1", "n2"]


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[08-10,12],login-1", ["gpu08", "gpu09", "gpu10", "gpu12", "login-1"]),
        ("a[1,3-4],b[007]", ["a1", "a3", "a4", "b007"]),
    ],
)
def test_slurms_list_of_nodes_is_written_out(text: str, nodes: list[str]):
    assert slurm_nodes(text) == nodes


# --- ranks as threads ----------------------------------------------------------------------------


def verdicts(
    run_dirs: list[Path | None], timeout_s: float = 20.0, world_size: int | None = None
) -> list[str]:
    """What each rank hears; '' if all is well."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def heard(rank: int) -> str:
        try:
            agree(
                store,
                report(rank),
                world_size=world_size or len(run_dirs),
                run_dir=run_dirs[rank],
                timeout_s=timeout_s,
            )
        except AlarmError as alarm:
            return str(alarm)
        return ""

    with ThreadPoolExecutor(len(run_dirs)) as ranks:
        return [*ranks.map(heard, range(len(run_dirs)))]


def test_fit_nodes_go_on_and_leave_nothing_in_the_folder(tmp_path: Path):
    assert verdicts([tmp_path / "runs" / "run"] * 4) == [""] * 4
    assert verdicts([None] * 4) == [""] * 4
    assert [*tmp_path.iterdir()] == []


def test_a_missing_rank_is_named_to_all_that_came(tmp_path: Path):
    message = "node n1 (rank 3) has not answered in 0.3 s"
    assert verdicts([tmp_path] * 3, timeout_s=0.3, world_size=4) == [message] * 3
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_a_node_has_of_its_own_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared_folder, "SEEN_S", 0.1)
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    dirs: list[Path | None] = [tmp_path / "one/run"] * 2 + [tmp_path / "other/run"] * 2
    message = (
        f"node n1 is not fit to write: run_dir={tmp_path}/other/run is not in a folder that all "
        f"nodes share ({tmp_path}/other)"
    )
    assert verdicts(dirs) == [message] * 4


def test_without_a_first_rank_the_others_do_not_wait_for_ever():
    store = dist.HashStore()  # type: ignore[attr-defined]
    with pytest.raises(AlarmError, match=r"rank 0 has said nothing about preflight/token in 0.1 s"):
        agree(store, report(1), world_size=2, run_dir=Path("run"), timeout_s=0.1)
    with pytest.raises(AlarmError, match=r"rank 0 has said nothing about preflight/verdict"):
        agree(store, report(1), world_size=2, run_dir=None, timeout_s=0.1)


def test_the_first_rank_stays_until_the_others_have_heard():
    """The store may end with it."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set("preflight/report/1", json.dumps(asdict(report(1, num_gpus=1))))
    with ThreadPoolExecutor(1) as ranks:
        leaving = ranks.submit(agree, store, report(0), world_size=2, run_dir=None)
        preflight_module._wait(store, ["preflight/heard/0"], 20)
        assert not wait([leaving], timeout=0.2).done
        store.set("preflight/heard/1", "")
        assert isinstance(leaving.exception(), AlarmError)


# --- this process --------------------------------------------------------------------------------


def test_a_report_speaks_of_this_process(monkeypatch: pytest.MonkeyPatch):
    found = report_here(rank=3, local_rank=1)
    assert (found.rank, found.local_rank, found.node) == (3, 1, node_name())
    assert found.versions["torch"].startswith("2.") and "vllm" in "".join(found.versions)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert node_name() == "n7"


def test_another_source_of_the_package_is_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "preflight.py").write_text("")
    monkeypatch.setattr(preflight_module, "__file__", str(tmp_path / "preflight.py"))
    before = versions_here()
    assert versions_here() == before
    (tmp_path / "other.py").write_text("x = 1")
    assert versions_here() != before


def test_one_process_is_fit_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    preflight(dist.HashStore(), run_dir=tmp_path / "run")  # type: ignore[attr-defined]
    assert [*tmp_path.iterdir()] == []


def test_an_all_reduce_over_one_process_is_its_own_sum(mesh: Mesh):
    check_all_reduce(mesh)

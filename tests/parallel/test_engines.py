"""Learner and rollout engine in the same processes, over layouts of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_srpo.hf_folder import read_tensors
from tests.e2e.small_run import write_small_run
from tests.parallel import engine_jobs
from tests.parallel.parity import TIED
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, write_policy

PARITY = """
from megatron_srpo.types import Score

def parity(prompt, response):
    return Score(value=float(len(response) % 2), correct=bool(len(response) % 2))
"""
CASES = {
    "qwen2, TP2, two engines": (2, {"tp": 2}, 1),
    "qwen2, TP2xDP2, two engines of two": (4, {"tp": 2}, 2),
    "qwen2, TP2xPP2, two engines of two": (4, {"tp": 2, "pp": 2}, 2),
    "qwen3_moe, EP2, one engine of two": (2, {"ep": 2}, 2),
    "olmo3, PP2, one engine of two": (2, {"pp": 2}, 2),
}
EVERY_FAMILY = {
    f"{family}, TP2xPP2, engines of {rollout_tp}": (4, {"tp": 2, "pp": 2}, rollout_tp)
    for family in FAMILIES
    for rollout_tp in (1, 2)
}
slow = [pytest.param(case, marks=pytest.mark.slow) for case in EVERY_FAMILY if case not in CASES]


@pytest.mark.parametrize("case", [*CASES, *slow])
def test_synced_engines_sample_what_the_trainer_would_and_share_the_prompts(
    pool: Pool, tmp_path: Path, case: str
) -> None:
    num, layout, rollout_tp = (CASES | EVERY_FAMILY)[case]
    family = case.partition(",")[0]
    policy = write_policy(tmp_path, seed=0, family=family, tied=family in TIED, num_layers=4)
    ranks = pool.run(num, engine_jobs.synced, policy, None, rollout_tp=rollout_tp, **layout)
    assert all(rank["alarm"] is None for rank in ranks), ranks[0]["alarm"]
    assert all(rank["probe"] == ranks[0]["probe"] for rank in ranks)
    worst = max(rank["off"] for rank in ranks)
    print(f"\n{case}: probe off by {max(ranks[0]['probe']):.1e}, completions by {worst:.1e} nats")
    assert worst <= 1e-5
    of_replica: dict[int, dict[str, list[int]]] = {}
    for rank in ranks:
        assert of_replica.setdefault(rank["replica"], rank["tokens"]) == rank["tokens"]
    assert len(of_replica) == num // rollout_tp
    answered = sorted(id for tokens in of_replica.values() for id in tokens)
    assert answered == sorted(engine_jobs.PROMPTS)


@pytest.mark.parametrize("stale_on", [0, 1])
def test_one_replica_s_stale_cache_stops_all_ranks(pool: Pool, policy: Path, stale_on: int) -> None:
    ranks = pool.run(2, engine_jobs.synced, policy, stale_on)
    (alarm,) = {rank["alarm"] for rank in ranks}
    assert alarm is not None and alarm.startswith("after weight sync 1")


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy never solves the task; the parity of its length gives it a gradient."""
    path = tmp_path_factory.mktemp("reward") / "parity.py"
    path.write_text(PARITY)
    return path


@pytest.mark.parametrize(("num", "tp", "pp", "rollout_tp"), [(2, 2, 1, 1), (4, 2, 2, 2)])
def test_a_run_replayed_on_another_layout_trains_the_same_policy(
    pool: Pool, parity: Path, tmp_path: Path, num: int, tp: int, pp: int, rollout_tp: int
) -> None:
    config = write_small_run(
        tmp_path,
        reward=f"{parity}:parity",
        optimizer={"lr": 3e-4, "eps": 1e-3},  # a small one makes noise of gradients near 0
    )
    layout = {"tp": tp, "pp": pp, "rollout_tp": rollout_tp}
    live, *others = pool.run(num, engine_jobs.trained, config, tmp_path / "live", None, **layout)
    assert all(torch.equal(rank[name], live[name]) for rank in others for name in live)
    (replayed,) = pool.run(1, engine_jobs.trained, config, tmp_path / "replayed", tmp_path / "live")
    before = dict(read_tensors(tmp_path / "model"))
    moved = max(float((live[name] - before[name]).abs().max()) for name in before)
    off = max(float((replayed[name] - live[name]).abs().max()) for name in live)
    print(f"\nparameters after a replay on one process off by {off:.1e}, moved by {moved:.1e}")
    assert moved > 1e-4
    assert off < 1e-6

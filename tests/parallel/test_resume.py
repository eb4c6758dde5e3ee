"""A run that was stopped and started again is the run that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_srpo.hf_folder import read_tensors
from tests.e2e.small_run import write_small_run
from tests.parallel import resume_jobs
from tests.parallel.pool import Pool
from tests.parallel.test_engines import PARITY

UNSTABLE = ("time/", "speed/", "memory/")
STOPPED = "stopped in step 4"


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(UNSTABLE)}
        for line in lines
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def folder(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one config, six steps and a checkpoint every two: `whole`, and `stopped` in its
    fifth step, whose rollouts are in its journal."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "parity_of_resumed.py").write_text(PARITY)
    config = write_small_run(
        folder,
        num_steps=6,
        reward=f"{folder}/parity_of_resumed.py:parity",
        optimizer={"lr": 3e-4, "eps": 1e-3, "warmup_steps": 3, "decay": "linear"},
        loss={"kl_coef": 0.1},  # of the initial policy, whatever was loaded
        checkpoint={"every": 2},
        retention={"data": str(folder / "demonstrations.jsonl")},
    )
    ((alarm, _),) = pool.run(1, resume_jobs.started, config, [f"run_dir={folder}/whole"])
    assert not alarm
    stopped = [f"run_dir={folder}/stopped", "checkpoint.asynchronous=false"]
    ((alarm, _),) = pool.run(1, resume_jobs.started, config, stopped, 4)
    assert alarm == STOPPED
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder / "stopped", to)
    return to


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    pool: Pool, folder: Path, tmp_path: Path
) -> None:
    run, whole = copy(folder, tmp_path / "run"), folder / "whole"
    ((alarm, asked),) = pool.run(1, resume_jobs.started, folder / "config.yaml", [f"run_dir={run}"])
    assert not alarm
    assert metrics(run) == metrics(whole)
    assert [line["step"] for line in metrics(run)] == list(range(7))
    assert names(run / "rollouts") == names(whole / "rollouts")
    for name in names(run / "rollouts"):
        assert (run / "rollouts" / name).read_bytes() == (whole / "rollouts" / name).read_bytes()
    trained, right = (dict(read_tensors(path / "hf")) for path in (run, whole))
    assert all(torch.equal(trained[name], right[name]) for name in right)
    # Step 4 was in the journal: only step 5's prompts were drawn, and two evaluations.
    assert asked["base"] == 4 * 4
    assert asked["eval"] == 2 * 8
    assert names(run / "checkpoints") == names(whole / "checkpoints") == ["000004", "000006"]


def test_on_another_layout_the_next_three_steps_are_the_uninterrupted_run_s(
    pool: Pool, folder: Path, tmp_path: Path
) -> None:
    """The newest checkpoint has no manifest: the one before counts, and three steps of the journal
    are trained on by two tensor parallel processes with an engine each."""
    run = copy(folder, tmp_path / "run")
    (run / "checkpoints" / "000004" / "manifest.json").unlink()
    overrides = [f"run_dir={run}", "checkpoint.asynchronous=false"]
    ranks = pool.run(2, resume_jobs.started, folder / "config.yaml", overrides, 5, tp=2)
    assert {alarm for alarm, _ in ranks} == {"stopped in step 5"}
    off = {
        name: max(
            abs(mine[name] - right[name]) / max(1.0, abs(right[name]))
            for mine, right in zip(metrics(run)[2:5], metrics(folder / "whole")[2:5], strict=True)
        )
        for name in ("loss", "loss/demonstrations", "grad_norm", "entropy", "reward/mean")
    }
    print(f"\nthree steps after a checkpoint, on another layout: off by {off}")
    assert max(off.values()) < 1e-5
    assert "000004 is no whole checkpoint and is ignored; goes on after step 2" in (
        run / "log.txt"
    ).read_text("utf-8")
    # The parts of the journal are still the one replica's where it was replayed, and two after.
    assert [name for name in names(run / "rollouts") if name.startswith(("000004", "000005"))] == [
        f"{stem}.{suffix}"
        for stem in ("000004-00000-of-00001", "000005-00000-of-00002", "000005-00001-of-00002")
        for suffix in ("jsonl", "npz")
    ]

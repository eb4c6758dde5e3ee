"""What was saved on one layout goes on, on another, as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.parallel import checkpoint_jobs
from tests.parallel.pool import Pool
from tests.tiny import write_policy

CASES = {
    "qwen2, TP2xPP2 to one process": (4, {"tp": 2, "pp": 2}, 1, {}),
    "qwen2, DP2 to TP2": (2, {}, 2, {"tp": 2}),
    "llama, one process to PP2": (1, {}, 2, {"pp": 2}),
    "olmo3, CP2 to TP2": (2, {"cp": 2}, 2, {"tp": 2}),
    "qwen3, PP2xVPP2 to TP2xDP2": (2, {"pp": 2, "vpp": 2}, 4, {"tp": 2}),
    "qwen3_moe, EP2 to EP1": (2, {"ep": 2}, 1, {}),
    "qwen3_moe, TP2 to EP2": (2, {"tp": 2}, 2, {"ep": 2, "overlap": True}),
}
"""The layout that saves, and the one that goes on."""


@pytest.mark.parametrize("case", CASES)
def test_on_another_layout_the_next_three_updates_are_the_uninterrupted_ones(
    pool: Pool, tmp_path: Path, case: str
) -> None:
    """The checkpoint is written while the saving learner goes on."""
    num, layout, others, other = CASES[case]
    family = case.partition(",")[0]
    policy = write_policy(tmp_path / "hf", seed=5, family=family, num_layers=4)
    folder = tmp_path / "checkpoint"
    stats, weights = pool.run(num, checkpoint_jobs.uninterrupted, policy, folder, **layout)[0]
    found, loaded = pool.run(others, checkpoint_jobs.resumed, policy, folder, **other)[0]
    off = max(
        abs(mine[name] - right[name]) / max(1.0, abs(right[name]))
        for mine, right in zip(found, stats, strict=True)
        for name in right
    )
    off_weights = max(float((loaded[name] - weights[name]).abs().max()) for name in weights)
    print(f"\nafter three updates metrics are off by {off:.1e}, weights by {off_weights:.1e}")
    assert max(off, off_weights) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_same_layout_they_are_so_to_the_last_bit(
    pool: Pool, policy: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """In bfloat16 only if the float32 master weights came back."""
    folder = tmp_path / "checkpoint"
    ((stats, weights),) = pool.run(1, checkpoint_jobs.uninterrupted, policy, folder, dtype)
    ((found, loaded),) = pool.run(1, checkpoint_jobs.resumed, policy, folder, dtype)
    assert found == stats
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_learner_that_has_not_stepped_can_be_saved(
    pool: Pool, policy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    ((right, weights),) = pool.run(1, checkpoint_jobs.saved_at_once, policy, folder)
    ((found, loaded),) = pool.run(1, checkpoint_jobs.resumed, policy, folder)
    assert found == right
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_disk_that_is_full_is_an_alarm_on_all_ranks(
    pool: Pool, policy: Path, tmp_path: Path
) -> None:
    """Found by the writers, while the learner goes on."""
    alarms = pool.run(2, checkpoint_jobs.lost_while_writing, policy, tmp_path / "checkpoint")
    for alarm in alarms:
        assert "checkpoint could not be written: RuntimeError: Worker failure: [Errno 28]" in alarm
        assert "GiB are free there" in alarm and "\n" not in alarm


def test_files_that_kept_their_size_and_lost_their_content_are_one_line_on_every_rank(
    pool: Pool, policy: Path, tmp_path: Path
) -> None:
    """And the learner loads a whole one after that."""
    whole = tmp_path / "000002" / "megatron"
    whole.parent.mkdir()
    pool.run(1, checkpoint_jobs.saved_at_once, policy, whole)
    folders: list[Path] = []
    for name in sorted(path.name for path in whole.iterdir()):
        folders.append(tmp_path / f"lost {name}" / "megatron")
        shutil.copytree(whole, folders[-1])
        content = (whole / name).read_bytes()
        (folders[-1] / name).write_bytes(bytes(min(1000, len(content))) + content[1000:])
    ranks = pool.run(2, checkpoint_jobs.refused, policy, [*folders, whole])
    for said in ranks:
        print(*said, sep="\n")
        assert said[-1] == "loaded"
        for folder, line in zip(folders, said, strict=False):
            assert line.startswith(f"{folder.parent}: cannot be read (") and "\n" not in line
            assert line.endswith("remove it to go on from an older checkpoint")

"""Where a run begins, and what it takes back before it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.checkpoint_store import find
from megatron_srpo.config import Config
from megatron_srpo.journal import is_whole
from megatron_srpo.resume import BEGINNING, progress_of, rewind
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import InputError
from tests.unit.builders import config
from tests.unit.test_checkpoint_store import lose_the_manifest, write


def cfg_of(root: Path, **changes: Any) -> Config:
    return config(run_dir=str(root), num_steps=10, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was stopped in step 6 of 10, after checkpoints of 2 and 4."""
    folder = RunFolder(tmp_path / "run")
    folder.create(cfg_of(folder.root))
    for step in (2, 4):
        write(folder.checkpoints, step)
    folder.metrics.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(6)))
    for step in range(6):
        put(folder, step, replica=0)
    return folder


def put(folder: RunFolder, step: int, *, replica: int, num_replicas: int = 1) -> None:
    folder.rollouts.mkdir(exist_ok=True)
    stem = f"{step:06d}-{replica:05d}-of-{num_replicas:05d}"
    for suffix in ("npz", "jsonl"):
        (folder.rollouts / f"{stem}.{suffix}").touch()


def steps_of(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def test_an_empty_folder_is_a_beginning(tmp_path: Path):
    assert progress_of(cfg_of(tmp_path / "new")) == BEGINNING
    assert BEGINNING.summary == ""


def test_a_run_goes_on_from_its_newest_checkpoint_with_its_journal(folder: RunFolder):
    progress = progress_of(cfg_of(folder.root))
    assert (progress.step, progress.checkpoint) == (4, folder.checkpoints / "000004")
    assert progress.journalled == range(4, 6)
    rewind(folder, progress)
    assert steps_of(folder) == [0, 1, 2, 3]
    assert is_whole(folder.rollouts, 5)


def test_a_torn_checkpoint_is_passed_over_and_told_of(folder: RunFolder):
    lose_the_manifest(folder.checkpoints / "000004")
    progress = progress_of(cfg_of(folder.root))
    assert (progress.step, progress.journalled) == (2, range(2, 6))
    assert progress.summary.startswith("000004 is no whole checkpoint and is ignored; goes on")


def test_without_any_checkpoint_the_journal_is_trained_on_from_the_first_step(folder: RunFolder):
    for path in find(folder.checkpoints)[0].values():
        lose_the_manifest(path)
    progress = progress_of(cfg_of(folder.root))
    assert (progress.step, progress.checkpoint, progress.journalled) == (0, None, range(6))


def test_a_step_that_one_replica_did_not_write_is_drawn_again(folder: RunFolder):
    put(folder, 6, replica=0, num_replicas=2)
    (folder.rollouts / "000006-00001-of-00002.jsonl.partial").touch()
    progress = progress_of(cfg_of(folder.root))
    assert progress.journalled == range(4, 6)
    rewind(folder, progress)
    assert not list(folder.rollouts.glob("000006*"))
    assert is_whole(folder.rollouts, 5)


def test_the_journal_is_followed_up_to_its_first_gap(folder: RunFolder):
    put(folder, 7, replica=0)
    assert progress_of(cfg_of(folder.root)).journalled == range(4, 6)


def test_a_line_that_was_cut_off_is_written_again(folder: RunFolder):
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "rew')
    rewind(folder, progress_of(cfg_of(folder.root)))
    assert steps_of(folder) == [0, 1, 2, 3]


def test_a_run_that_stopped_before_its_first_line_is_rewound_to_nothing(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.create(cfg_of(folder.root))
    rewind(folder, progress_of(cfg_of(folder.root)))
    assert not folder.metrics.exists()


def test_a_finished_run_is_refused(folder: RunFolder):
    folder.hf.mkdir()
    with pytest.raises(InputError, match="already holds another run"):
        progress_of(cfg_of(folder.root))


def test_a_folder_that_no_run_made_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="already holds another run"):
        progress_of(cfg_of(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "holds an unfinished run with seed=0, not 1; go on with its own config.yaml"),
        ({"optimizer": {"lr": 2e-6}}, "unfinished run with optimizer.lr=1e-06, not 2e-06"),
        ({"model": "another"}, "unfinished run with model=model, not another"),
    ],
)
def test_a_run_of_another_config_is_refused_in_one_line(
    folder: RunFolder, changes: dict[str, Any], message: str
):
    with pytest.raises(InputError) as error:
        progress_of(cfg_of(folder.root, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"tp": 2, "pp": 2}},
        {"rollout": {"tp": 2, "max_num_seqs": 3, "kv_cache_bytes": 1}},
        {"micro_batch_tokens": 7},
        {"checkpoint": {"every": 3}},
        {"log": {"wandb": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_how_the_work_is_divided_and_told_of_may_differ(folder: RunFolder, changes: dict[str, Any]):
    assert progress_of(cfg_of(folder.root, **changes)).step == 4

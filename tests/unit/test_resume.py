"""Where a run begins, and what it takes back before it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.checkpoint_store import find
from megatron_srpo.config import Config
from megatron_srpo.journal import Journal, is_whole
from megatron_srpo.resume import BEGINNING, begin, progress_of, rewind
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import InputError
from tests.unit.builders import config, group, rollout
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
    journal = Journal(folder=folder.rollouts, replica=replica, num_replicas=num_replicas)
    journal.write(step, [group(rollout("1"))])


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


def test_with_a_finished_run_of_the_same_config_nothing_is_to_do(folder: RunFolder):
    assert not progress_of(cfg_of(folder.root)).is_finished
    folder.hf.mkdir()
    assert progress_of(cfg_of(folder.root)).is_finished


def test_a_finished_run_of_another_config_is_refused(folder: RunFolder):
    folder.hf.mkdir()
    with pytest.raises(InputError, match="holds a finished run with seed=0, not 1; go on"):
        progress_of(cfg_of(folder.root, seed=1))


def test_a_warm_start_is_no_finished_run(tmp_path: Path):
    folder = RunFolder(tmp_path / "sft")
    folder.create(cfg_of(folder.root))
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


def test_a_run_begins_only_where_nobody_has_worked_since_it_looked(folder: RunFolder):
    cfg = cfg_of(folder.root, micro_batch_tokens=7)
    seen = progress_of(cfg)
    put(folder, 6, replica=0)
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="another process was at work there meanwhile"):
        begin(cfg, [seen])
    with pytest.raises(InputError, match="meanwhile"):  # whichever rank has seen the old state
        begin(cfg, [progress_of(cfg), seen])
    assert before == {path: path.read_bytes() for path in before}
    begin(cfg, [progress_of(cfg)])
    assert steps_of(folder) == [0, 1, 2, 3]
    assert "micro_batch_tokens: 7" in folder.config.read_text()


def test_a_run_that_has_finished_meanwhile_is_refused(folder: RunFolder):
    seen = progress_of(cfg_of(folder.root))
    folder.hf.mkdir()
    with pytest.raises(InputError, match="another process was at work there meanwhile"):
        begin(cfg_of(folder.root), [seen])
    assert steps_of(folder) == [*range(6)]


def test_a_replay_goes_on_as_the_same_replay_only(tmp_path: Path):
    folder, of = RunFolder(tmp_path / "run"), tmp_path / "of"
    cfg = cfg_of(folder.root)
    begin(cfg, [progress_of(cfg, of)], of)
    assert progress_of(cfg, tmp_path / "run" / ".." / "of") == BEGINNING
    for other in (None, tmp_path / "another"):
        with pytest.raises(InputError, match=f"was begun with --replay {of}; go on") as error:
            progress_of(cfg, other)
        assert "\n" not in str(error.value)


def test_a_run_that_drew_its_rollouts_does_not_become_a_replay(folder: RunFolder):
    with pytest.raises(InputError, match="was begun without --replay; go on without --replay, or"):
        progress_of(cfg_of(folder.root), folder.root.parent / "of")


def test_a_step_whose_rollouts_cannot_be_read_is_drawn_again(folder: RunFolder):
    (folder.rollouts / "000005-00000-of-00001.npz").write_bytes(b"")
    assert progress_of(cfg_of(folder.root)).journalled == range(4, 5)


def test_a_checkpoint_whose_state_cannot_be_read_is_named_before_anything_starts(
    folder: RunFolder,
):
    state = folder.checkpoints / "000004" / "state.json"
    state.write_bytes(bytes(len(state.read_bytes())))
    with pytest.raises(InputError, match=r"000004: cannot be read \(state.json: .*remove it to go"):
        progress_of(cfg_of(folder.root))


def test_a_whole_line_that_cannot_be_read_is_named_unless_it_is_the_last(folder: RunFolder):
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    nothing = bytes(20) + b"\n"
    progress = progress_of(cfg_of(folder.root))
    folder.metrics.write_bytes(b"".join([*lines[:2], nothing, *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics.jsonl: line 3 cannot be read; remove"):
        rewind(folder, progress)
    folder.metrics.write_bytes(b"".join([*lines, nothing]))
    rewind(folder, progress)
    assert steps_of(folder) == [0, 1, 2, 3]


def test_of_an_export_that_was_killed_nothing_stays(folder: RunFolder):
    (folder.root / "hf.0123abcd.partial").mkdir()
    (folder.root / "hf.0123abcd.partial" / "model.safetensors").write_bytes(b"half")
    rewind(folder, progress_of(cfg_of(folder.root)))
    assert not [*folder.root.glob("hf*")]

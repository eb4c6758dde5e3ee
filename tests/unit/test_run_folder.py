"""A run folder is free, at work, unfinished or finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import InputError
from tests.unit.builders import config


def test_a_run_is_unfinished_between_its_config_and_its_trained_policy(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_unfinished
    folder.create(config())
    assert folder.is_unfinished
    assert [path.name for path in folder.root.iterdir()] == ["config.yaml"]
    folder.hf.mkdir()
    assert not folder.is_unfinished


def test_a_folder_is_idle_until_a_process_holds_its_log_and_after_it_let_go(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.check_idle()
    with folder.log.open("a") as log:
        folder.lock(log)
        with pytest.raises(InputError, match="another process is at work there; stop it first"):
            folder.check_idle()
        with folder.log.open("a") as other, pytest.raises(InputError):
            folder.lock(other)
    folder.check_idle()


def test_looking_does_not_keep_others_from_looking(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.log.touch()
    folder.check_idle()
    folder.check_idle()

"""What one rank writes for the others to find, and what a node that does not find it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_srpo import shared_folder
from megatron_srpo.shared_folder import Token, problem_with, token_for


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    with token_for(file / "run") as token:  # the nearest folder is above the file
        assert problem_with(file / "run", token) is None
    with token_for(Path("/proc/run")) as token:
        problem = problem_with(Path("/proc/run"), token)
    assert problem is not None
    assert problem.startswith("run_dir=/proc/run cannot be written to (/proc: ")


def test_a_token_of_other_content_is_another_folder(tmp_path: Path):
    with token_for(tmp_path / "run") as token:
        assert token.up == 1
        other = replace(token, content="else")
        assert "does not hold what the first rank" in (problem_with(tmp_path / "run", other) or "")
    away = Token(up=0, name="", content="", problem="/x: Read-only file system")
    said = problem_with(tmp_path, away)
    assert said == f"run_dir={tmp_path} cannot be written to (/x: Read-only file system)"


def test_a_token_that_does_not_come_in_time_means_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared_folder, "SEEN_S", 0.1)
    nowhere = Token(up=1, name=".preflight-x", content="x")
    said = problem_with(tmp_path / "run", nowhere)
    assert said == (f"run_dir={tmp_path}/run is not in a folder that all nodes share ({tmp_path})")


def test_a_check_leaves_nothing_behind_and_makes_no_run_folder(tmp_path: Path):
    with token_for(tmp_path / "a" / "run") as token:
        assert [path.name for path in tmp_path.iterdir()] == [token.name]
        assert problem_with(tmp_path / "a" / "run", token) is None
        assert [path.name for path in tmp_path.iterdir()] == [token.name]
    assert [*tmp_path.iterdir()] == []

"""A run folder is free, at work, unfinished or finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.claim import claimed
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import InputError
from tests.unit.builders import config


def test_a_run_begins_with_its_config_and_ends_with_its_trained_policy(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_begun
    folder.create(config())
    assert folder.is_begun and not folder.is_finished
    assert [path.name for path in folder.root.iterdir()] == ["config.yaml"]
    folder.rollouts.mkdir()
    assert not folder.is_finished
    folder.hf.mkdir()
    assert folder.is_finished


def test_a_folder_is_idle_until_a_process_holds_its_log_and_after_it_let_go(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.check_idle()
    with folder.at_work():
        with pytest.raises(InputError, match="another process is at work there; stop it first"):
            folder.check_idle()
        with pytest.raises(InputError), folder.at_work():
            pass
    folder.check_idle()


def test_looking_does_not_keep_others_from_looking(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.log.touch()
    folder.check_idle()
    folder.check_idle()


def test_what_a_run_leaves_that_was_killed_before_it_had_its_config_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(self: Path, to: Path) -> None:
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt), folder.at_work():
            folder.create(config(), replay=tmp_path)
    names = {path.name for path in folder.root.iterdir()}
    assert names == {"config.yaml.partial", "replay.txt", "log.txt"}
    assert not folder.is_begun
    folder.check_free()
    folder.create(config())
    assert {path.name for path in folder.root.iterdir()} == {"config.yaml", "log.txt"}


def test_a_log_with_something_in_it_is_not_free(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.log.write_text("kept")
    with pytest.raises(InputError, match="already holds another run"):
        folder.check_free()


def claim(
    folder: RunFolder, begin: Callable[[], None], rank: int = 0, said: str | None = None
) -> contextlib.AbstractContextManager[None]:
    """As a rank among others; `said` is what the first one says if this is another."""

    def gather(value: Any) -> list[Any]:
        return [value if rank == 0 else said]

    return claimed(folder, begin, rank=rank, gather=gather)


def test_who_comes_second_touches_nothing_that_the_first_has_written(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    with claim(folder, lambda: folder.create(config())):
        before = folder.config.read_bytes()
        late = claim(folder, lambda: folder.create(config(seed=1)))
        with pytest.raises(InputError, match="another process is at work there"), late:
            pass
        assert folder.config.read_bytes() == before
    folder.check_idle()


def test_a_refusal_is_heard_on_ranks_that_did_not_ask(tmp_path: Path):
    def refuse() -> None:
        raise InputError("no")

    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=r"^no$"), claim(folder, refuse):
        pass
    with pytest.raises(InputError, match=r"^no$"), claim(folder, refuse, rank=1, said="no"):
        pass
    with claim(folder, refuse, rank=1):  # only the first rank begins
        folder.check_idle()


def test_a_folder_that_cannot_be_written_to_is_a_refusal_too(tmp_path: Path):
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(InputError, match=r"run_dir=.*Not a directory"), claim(folder, list):
        pass


def test_a_folder_whose_log_cannot_be_opened_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = RunFolder(tmp_path)
    folder.log.touch()

    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"run_dir=.*: \[Errno 30\] Read-only file system"):
        folder.check_idle()


def test_what_a_killed_preflight_has_left_is_nobodys(tmp_path: Path):
    (tmp_path / ".preflight-0a").touch()
    RunFolder(tmp_path).check_free()

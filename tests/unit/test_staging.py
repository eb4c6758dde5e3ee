"""A folder is whole or not there, whatever stops its writer; a full disk is said in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_srpo.staging import (
    append_durably,
    check_free,
    leftovers,
    on_disk,
    staged_folder,
    write_durably,
)
from megatron_srpo.types import AlarmError, InputError
from tests.unit.full_disk import files_up_to


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_its_name_only_when_it_is_finished(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("content")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "content"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_of_a_broken_attempt_nothing_stays(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error, match="died"), staged_folder(tmp_path / "out") as partial:
        (partial / "stale").write_text("")
        raise error("died")
    assert names(tmp_path) == []


def test_what_happens_to_be_called_partial_is_not_touched(tmp_path: Path):
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        root = tmp_path / str(len(names(tmp_path)))
        root.mkdir()
        make(root / "out.partial")
        with staged_folder(root / "out") as partial:
            (partial / "new").write_text("")
        assert names(root) == ["out", "out.partial"]
        assert names(root / "out") == ["new"]


def test_a_finished_folder_may_be_read_by_whom_other_new_folders_may(tmp_path: Path):
    (tmp_path / "other").mkdir()
    with staged_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_contents_are_on_disk_before_they_have_their_name_and_the_name_is_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[tuple[str, bool]] = []
    out, fsync = tmp_path / "out", os.fsync

    def spied(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, out.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spied)
    with staged_folder(out) as partial:
        (partial / "file").write_text("content")
    assert synced == [(partial.name, False), ("file", False), (tmp_path.name, True)]


def write_plainly(folder: Path) -> None:
    (folder / "file").write_bytes(bytes(100_000))


def write_with_torch(folder: Path) -> None:
    with (folder / "file").open("wb") as stream:
        torch.save(torch.zeros(25_000), stream)


def write_with_safetensors(folder: Path) -> None:
    save_file({"a": torch.zeros(25_000)}, folder / "file")


@pytest.fixture
def small_disk() -> Iterator[None]:
    with files_up_to(50_000):
        yield


@pytest.mark.parametrize("write", [write_plainly, write_with_torch, write_with_safetensors])
def test_on_a_full_disk_nothing_is_left_and_one_line_says_so(
    tmp_path: Path, small_disk: None, write: Callable[[Path], None]
):
    with (
        pytest.raises(InputError, match=r"out: a file may not grow that large") as error,
        staged_folder(tmp_path / "out") as partial,
    ):
        write(partial)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


def test_an_error_that_has_nothing_to_do_with_the_disk_stays_what_it_is(tmp_path: Path):
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out"):
        (tmp_path / "nowhere" / "file").write_text("")


def test_a_folder_that_exists_or_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists already"):
        check_free(tmp_path)
    with pytest.raises(InputError, match=r"file is no folder that can be written to"):
        check_free(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="exists already"), staged_folder(tmp_path):
        raise AssertionError("must not be entered")
    check_free(tmp_path / "new" / "newer")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="link: exists already"):
        check_free(tmp_path / "link")


def test_what_a_run_cannot_write_is_an_alarm_that_names_the_file(tmp_path: Path, small_disk: None):
    write_durably(tmp_path / "new" / "file", bytes(100))
    for write, name in ((write_durably, "file"), (append_durably, "lines")):
        with pytest.raises(AlarmError, match="a file may not grow that large") as error:
            write(tmp_path / "new" / name, bytes(100_000))
        assert str(error.value).startswith(f"{tmp_path / 'new' / name} could not be written: ")
        assert "\n" not in str(error.value)
    assert (tmp_path / "new" / "file").read_bytes() == bytes(100)


def test_what_came_from_another_process_and_what_a_folder_refused_are_alarms_too(tmp_path: Path):
    out = tmp_path / "out"
    with (
        pytest.raises(AlarmError, match="out could not be written: the disk is full"),
        on_disk(out),
    ):
        raise RuntimeError("Worker failure: [Errno 28] No space left on device")
    with (
        pytest.raises(AlarmError, match="out could not be written: a file may not grow"),
        on_disk(out),
        files_up_to(50_000),
        staged_folder(out) as partial,
    ):
        write_plainly(partial)
    with pytest.raises(RuntimeError, match="odd"), on_disk(tmp_path):
        raise RuntimeError("odd")


def test_lines_are_on_disk_when_they_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "lines").read_bytes()))
    append_durably(tmp_path / "lines", b"a\n")
    append_durably(tmp_path / "lines", b"b\n")
    assert synced == [b"a\n", b"a\nb\n"]


def test_leftovers_are_what_a_killed_process_left_of_that_folder(tmp_path: Path):
    for name in ("out.0123abcd.partial", "out.partial", "out.x.partial", "outer.0123abcd.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in leftovers(tmp_path / "out")] == ["out.0123abcd.partial"]

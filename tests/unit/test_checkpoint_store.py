"""What is not whole is no checkpoint; the rules keep what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_srpo.checkpoint_folder import read_manifest, write_manifest
from megatron_srpo.checkpoint_store import (
    RunState,
    find,
    kept,
    partial_place,
    place,
    publish,
    remove,
)
from megatron_srpo.types import InputError


def write(folder: Path, step: int) -> Path:
    """A whole checkpoint."""
    partial = partial_place(folder, step)
    (partial / "megatron").mkdir(parents=True)
    (partial / "megatron" / "tensors").write_bytes(b"x" * 100)
    RunState(step=step, data={"position": 4 * step}, layout={"processes": 1}).write(partial)
    write_manifest(partial, dtype="float32", contents=("model",))
    publish(partial, place(folder, step))
    return place(folder, step)


def test_a_published_checkpoint_is_found_under_its_step_with_its_state(tmp_path: Path):
    paths = {step: write(tmp_path, step) for step in (12, 2, 1_000_000)}
    whole, torn = find(tmp_path)
    assert whole == paths
    assert torn == []
    assert whole[12].name == "000012"
    assert RunState.read(whole[12]).data == {"position": 48}


def test_a_run_without_checkpoints_has_none(tmp_path: Path):
    assert find(tmp_path / "checkpoints") == ({}, [])


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])


def cut_a_file(path: Path) -> None:
    (path / "megatron" / "tensors").write_bytes(b"x" * 99)


def lose_a_file(path: Path) -> None:
    (path / "megatron" / "tensors").unlink()


def never_rename(path: Path) -> None:
    path.rename(path.with_name(path.name + ".partial"))


@pytest.mark.parametrize(
    "tear", [lose_the_manifest, cut_the_manifest, cut_a_file, lose_a_file, never_rename]
)
def test_a_torn_checkpoint_is_none_and_the_one_before_it_counts(tmp_path: Path, tear):
    write(tmp_path, 2)
    tear(write(tmp_path, 4))
    whole, torn = find(tmp_path)
    assert list(whole) == [2]
    assert [path.name.removesuffix(".partial") for path in torn] == ["000004"]


def test_what_is_no_checkpoint_s_name_is_left_alone(tmp_path: Path):
    write(tmp_path, 2)
    for name in ("notes", "000004.bak", "4th"):
        (tmp_path / name).mkdir()
    (tmp_path / "000006").touch()
    assert find(tmp_path) == ({2: place(tmp_path, 2)}, [])


def test_publishing_takes_the_place_of_what_was_torn_there(tmp_path: Path):
    lose_the_manifest(write(tmp_path, 4))
    path = write(tmp_path, 4)
    assert read_manifest(path).dtype == "float32"
    assert [p.name for p in tmp_path.iterdir()] == ["000004"]


def test_removal_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, 4)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(path)
    assert (path / "megatron" / "tensors").exists()
    assert find(tmp_path) == ({}, [path])


def test_keep_rules_on_hand_computed_examples():
    steps = range(2, 21, 2)
    assert kept(steps, keep_last=2, keep_every=0) == {18, 20}
    assert kept(steps, keep_last=1, keep_every=8) == {8, 16, 20}
    assert kept([], keep_last=1, keep_every=8) == set()


@given(
    steps=st.sets(st.integers(1, 10_000)),
    keep_last=st.integers(1, 5),
    keep_every=st.integers(0, 50),
)
def test_the_newest_stays_and_nothing_that_was_dropped_comes_back(
    steps: set[int], keep_last: int, keep_every: int
):
    stay = kept(steps, keep_last=keep_last, keep_every=keep_every)
    assert stay <= steps
    assert set(sorted(steps)[-keep_last:]) <= stay
    assert all(step % keep_every == 0 for step in stay - set(sorted(steps)[-keep_last:]))
    assert kept(stay, keep_last=keep_last, keep_every=keep_every) == stay


@pytest.mark.parametrize("content", [b"", bytes(90), b"{}", b"null", b'{"step": 4', b"\xff"])
def test_a_state_that_cannot_be_read_names_its_checkpoint_and_the_way_out(
    tmp_path: Path, content: bytes
):
    path = write(tmp_path, 4)
    (path / "state.json").write_bytes(content)
    with pytest.raises(InputError, match=r"000004: cannot be read .*remove it to go on") as error:
        RunState.read(path)
    assert "\n" not in str(error.value)

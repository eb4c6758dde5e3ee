"""What is written can be read back, is whole or absent, and is the same bytes every time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_srpo.journal import (
    Journal,
    Replay,
    Resumed,
    check_replay,
    drop_from,
    is_whole,
    read_step,
)
from megatron_srpo.types import AlarmError, Group, InputError, Prompt, Reset, Score, Thought
from tests.unit.builders import group, prompt, rollout

HARD_TEXT = 'a "quote", a \\ backslash,\u2028 \u2029 \x85 \r\n\t\0 é 漢 🙂'


def step_of(id: str) -> list[Group]:
    """Two groups of one prompt; every field has a value that is not its default."""
    asked = Prompt(
        id=id,
        text=HARD_TEXT,
        token_ids=np.array([7, 8, 9], np.int32),
        answer='"1"\u2028',
        solution=("5\n", "8"),
    )
    base = group(
        rollout("5\n1", id=f"{id}/0", of=asked, reward=0.1, weight_version=3, stage="extra"),
        rollout(HARD_TEXT, id=f"{id}/1", of=asked, failure="no\nverdict", num_cached_tokens=5),
        rollout("12345", id=f"{id}/2", of=asked, finish_reason="length"),
    )
    reset = Reset(
        seed_id=f"{id}/2",
        thought=1,
        cause="unparsed",
        answer=HARD_TEXT,
        num_tokens=4,
        num_cached_tokens=6,
        moved_from=2,
    )
    skipped = Reset(seed_id=f"{id}/1", thought=None, cause="too_long")
    suffix = group(
        rollout("1234\n1", id=f"{id}/s", of=asked, num_copied=4, seed_id=f"{id}/2"),
        resets=(reset, skipped),
        use="replaced",
    )
    return [base, suffix]


def journal(folder: Path, replica: int = 0, num_replicas: int = 1) -> Journal:
    return Journal(folder=folder, replica=replica, num_replicas=num_replicas)


def plain(value: Any) -> Any:
    """Nouns as nested tuples, arrays with their type, so that == compares all there is."""
    if is_dataclass(value):
        return type(value).__name__, [
            (f.name, plain(getattr(value, f.name))) for f in fields(value)
        ]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def test_every_field_of_every_group_comes_back_as_it_was(tmp_path: Path):
    groups = step_of("p") + step_of("q")
    journal(tmp_path).write(12, groups)
    assert plain(read_step(tmp_path, 12)) == plain(groups)


def test_a_second_opinion_is_on_record_and_its_absence_in_older_journals_is_none(tmp_path: Path):
    score = Score(value=1.0, correct=True, second_opinion=False)
    journal(tmp_path).write(0, [group(replace(rollout("1"), score=score))])
    (path,) = tmp_path.glob("*.jsonl")
    assert read_step(tmp_path, 0)[0].rollouts[0].score == score
    path.write_text(path.read_text().replace(', "second_opinion": false', ""))
    older = read_step(tmp_path, 0)[0].rollouts[0].score
    assert older == Score(value=1.0, correct=True)


def test_numbers_of_numpy_come_back_as_plain_ones(tmp_path: Path):
    score = Score(value=np.float32(0.5), correct=np.bool_(True))  # type: ignore[arg-type]
    scored = replace(rollout("1"), score=score)
    reset = Reset(seed_id="r", thought=np.int64(1), cause="mine")  # type: ignore[arg-type]
    journal(tmp_path).write(0, [group(scored, resets=(reset,))])
    (back,) = read_step(tmp_path, 0)
    assert repr(back.rollouts[0].score) == repr(Score(value=0.5, correct=True))
    assert repr(back.resets[0]) == repr(Reset(seed_id="r", thought=1, cause="mine"))


def test_what_json_cannot_hold_is_not_written(tmp_path: Path):
    reset = Reset(seed_id="r", thought=None, cause=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        journal(tmp_path).write(0, [group(rollout("1"), resets=(reset,))])
    assert not list(tmp_path.iterdir())


def test_the_comparison_of_this_file_sees_every_field():
    groups = step_of("p")
    seen = str(plain(groups))
    for noun in (Group, Prompt, Reset, Score, Thought):
        assert all(f"'{field.name}'" in seen for field in fields(noun))


def test_what_was_read_is_read_only_and_its_rollouts_share_their_prompt(tmp_path: Path):
    journal(tmp_path).write(0, step_of("p"))
    base, _ = read_step(tmp_path, 0)
    assert all(r.prompt is base.prompt for r in base.rollouts)
    with pytest.raises(ValueError, match="read-only"):
        base.rollouts[0].token_ids[0] = 0


def test_the_same_groups_make_the_same_bytes(tmp_path: Path):
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        journal(tmp_path / name).write(3, step_of("p"))
        contents.append({f.name: f.read_bytes() for f in sorted((tmp_path / name).iterdir())})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"000003-00000-of-00001.jsonl", "000003-00000-of-00001.npz"}


def test_a_step_that_was_read_and_written_again_has_the_same_bytes(tmp_path: Path):
    journal(tmp_path).write(3, step_of("p") + step_of("q"))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    journal(tmp_path).write(3, read_step(tmp_path, 3))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_each_group_is_one_line_whatever_its_text_holds(tmp_path: Path):
    journal(tmp_path).write(0, step_of("p"))
    content = (tmp_path / "000000-00000-of-00001.jsonl").read_bytes()
    assert content.count(b"\n") == 2 and content.endswith(b"\n")


def test_replicas_are_read_in_their_order(tmp_path: Path):
    for replica in (1, 0, 2):
        journal(tmp_path, replica, 3).write(5, step_of(f"p{replica}"))
    assert [g.prompt.id for g in read_step(tmp_path, 5)] == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_a_missing_part_is_an_error_that_counts_the_parts(tmp_path: Path):
    for replica in (0, 2):
        journal(tmp_path, replica, 3).write(5, step_of(f"p{replica}"))
    with pytest.raises(InputError, match="step 5 has 2 of 3 parts"):
        read_step(tmp_path, 5)


def test_a_missing_step_is_an_error_that_names_it(tmp_path: Path):
    journal(tmp_path).write(5, step_of("p"))
    with pytest.raises(InputError, match="no rollouts of step 6"):
        read_step(tmp_path, 6)


def test_a_step_is_whole_when_every_replica_has_written_it(tmp_path: Path):
    assert not is_whole(tmp_path, 5)
    for replica, whole in ((0, False), (2, False), (1, True)):
        journal(tmp_path, replica, 3).write(5, step_of(f"p{replica}"))
        assert is_whole(tmp_path, 5) == whole


def test_dropping_from_a_step_leaves_the_steps_before_it(tmp_path: Path):
    for step in (4, 5, 6):
        journal(tmp_path).write(step, step_of("p"))
    (tmp_path / "000005-00001-of-00002.npz.partial").touch()
    drop_from(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000004-00000-of-00001.jsonl",
        "000004-00000-of-00001.npz",
    ]


def test_what_the_journal_holds_is_neither_drawn_nor_written_again(tmp_path: Path):
    for replica in range(2):
        journal(tmp_path, replica, 2).write(5, step_of(f"p{replica}"))
    held, asked = range(5, 6), []

    def draw(prompts: Sequence[Prompt], *, step: int) -> list[Group]:
        asked.append(step)
        return []

    collect = Resumed(replay=Replay(folder=tmp_path), held=held, draw=draw)
    writer = replace(journal(tmp_path), held=held)
    for step in (5, 6):
        groups = collect([prompt(id="p1")], step=step)
        writer.write(step, groups)
        assert [g.prompt.id for g in groups] == (["p1", "p1"] if step == 5 else [])
    assert asked == [6]
    assert sorted(path.stem for path in tmp_path.glob("*.jsonl")) == [
        "000005-00000-of-00002",
        "000005-00001-of-00002",
        "000006-00000-of-00001",
    ]


def test_a_half_written_part_is_ignored(tmp_path: Path):
    # What kill -9 leaves: arrays whole or not, the lines still under their temporary name.
    journal(tmp_path).write(5, step_of("p"))
    (tmp_path / "000005-00000-of-00001.jsonl").rename(
        tmp_path / "000005-00000-of-00001.jsonl.partial"
    )
    with pytest.raises(InputError, match="no rollouts of step 5"):
        read_step(tmp_path, 5)
    journal(tmp_path).write(5, step_of("q"))
    assert [g.prompt.id for g in read_step(tmp_path, 5)] == ["q", "q"]
    assert not list(tmp_path.glob("*.partial"))


def test_lines_are_written_after_their_arrays(tmp_path: Path):
    (tmp_path / "000005-00000-of-00001.npz.partial").mkdir()  # arrays cannot be written here
    with pytest.raises(AlarmError, match="Is a directory"):
        journal(tmp_path).write(5, step_of("p"))
    assert not list(tmp_path.glob("*.jsonl*"))


def test_a_file_is_on_disk_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[bool, list[str]]] = []

    def look(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append((is_folder, sorted(file.suffix for file in tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", look)
    journal(tmp_path).write(5, step_of("p"))
    assert seen == [
        (False, [".partial"]),
        (True, [".npz"]),
        (False, [".npz", ".partial"]),
        (True, [".jsonl", ".npz"]),
    ]


def test_lines_without_their_arrays_are_a_missing_part(tmp_path: Path):
    journal(tmp_path).write(5, step_of("p"))
    (tmp_path / "000005-00000-of-00001.npz").unlink()
    with pytest.raises(InputError, match="000005-00000-of-00001"):
        read_step(tmp_path, 5)


def test_a_replay_gives_the_groups_of_the_prompts_that_it_is_asked_for(tmp_path: Path):
    journal(tmp_path, 0, 2).write(5, step_of("p") + step_of("q"))
    journal(tmp_path, 1, 2).write(5, step_of("r"))
    replay = Replay(folder=tmp_path)
    asked = [prompt(id="r"), prompt(id="p")]
    groups = replay(asked, step=5)
    assert sorted(g.prompt.id for g in groups) == ["p", "p", "r", "r"]
    expected = [plain(g) for g in step_of("p") + step_of("r")]
    assert all(plain(g) in expected for g in groups)


def test_a_replay_of_other_prompts_is_an_error_that_says_what_it_needs(tmp_path: Path):
    journal(tmp_path, 0, 2).write(5, step_of("p"))
    journal(tmp_path, 1, 2).write(5, step_of("q"))
    check_replay(tmp_path, ["p", "q"], step=5)
    with pytest.raises(InputError, match="step 5 has no rollouts of prompt 'z'; a replay needs"):
        check_replay(tmp_path, ["p", "z"], step=5)
    with pytest.raises(InputError, match="no rollouts of step 6"):
        check_replay(tmp_path, ["p"], step=6)


def test_the_journal_is_read_as_utf8_whatever_the_locale(tmp_path: Path):
    journal(tmp_path).write(0, step_of("p"))
    read = (
        "import pathlib, sys; from megatron_srpo.journal import read_step;"
        "print(ascii(read_step(pathlib.Path(sys.argv[1]), 0)[0].prompt.text))"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", read, str(tmp_path)],
        env=os.environ | ascii_only | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == ascii(HARD_TEXT), done.stderr[-300:]


def no_bytes(content: bytes) -> bytes:
    return b""


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeros_within(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[: middle - 64] + bytes(128) + content[middle + 64 :]


@pytest.mark.parametrize("suffix", ["npz", "jsonl"])
@pytest.mark.parametrize("damage", [no_bytes, zeros, half, zeros_within])
def test_a_damaged_part_is_not_whole_and_named_where_it_is_needed(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
):
    journal(tmp_path).write(5, step_of("p"))
    assert is_whole(tmp_path, 5)
    path = tmp_path / f"000005-00000-of-00001.{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    assert not is_whole(tmp_path, 5)
    with pytest.raises(InputError, match=r"000005-00000-of-00001: cannot be read") as error:
        read_step(tmp_path, 5)
    assert "\n" not in str(error.value)


def test_files_that_are_not_the_journal_s_stay_and_count_for_nothing(tmp_path: Path):
    journal(tmp_path).write(5, step_of("p"))
    mine = {"notes-of-mine-of-x", "000005-copy-of-mine.jsonl", "000005-00001-of-00001.jsonl~"}
    for name in mine:
        (tmp_path / name).write_text("kept")
    assert is_whole(tmp_path, 5)
    drop_from(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == mine

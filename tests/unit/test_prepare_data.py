"""Every row is accounted for; what is written depends on the rows and the seed, not on files."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from prepare.selection import key_of
from prepare_data import main

from megatron_srpo.data import read_prompts
from tests.unit.builders import TOKENIZER
from tests.unit.prepared import Command, answers, problems, read_items, write_rows

SIZES = ("--num-train", 8, "--num-test", 4)


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


def ace(tmp_path: Path, rows: list[dict[str, Any]]) -> tuple[str, str, Path]:
    """Arguments for a set that is divided here."""
    return "acereason-math", "--from", write_rows(tmp_path / "hub/math.jsonl", rows).parent


def parts(prepare: Command) -> dict[str, list[str]]:
    files = (prepare.out / name for name in prepare.files())
    return {file.stem: [item["prompt"] for item in read_items(file)] for file in files}


# --- parts ---------------------------------------------------------------------------------------


def test_what_is_written_is_what_training_reads(prepare: Command, tmp_path: Path):
    prepare(*ace(tmp_path, problems(range(20))), *SIZES)
    for part, size in (("train", 8), ("test", 4)):
        read, dropped = read_prompts(
            prepare.out / f"{part}.jsonl", TOKENIZER, max_prompt_tokens=99, long_prompts="error"
        )
        assert (len(read), dropped) == (size, [])
        assert all(p.answer == str(2 * int(p.text.split()[2])) for p in read)


def test_the_parts_of_a_pool_share_nothing(prepare: Command, tmp_path: Path):
    line = prepare(*ace(tmp_path, problems(range(20))), *SIZES)
    written = parts(prepare)
    assert not {*written["train"]} & {*written["test"]}
    assert line.endswith("read 20 rows of 1 files; left out: 8 not drawn")


def test_the_same_seed_writes_the_same_bytes_from_rows_in_any_order(
    prepare: Command, tmp_path: Path
):
    rows = problems(range(30)) + problems([1, 2, 3])
    for row in rows[30:]:
        row["problem"] = row["problem"].replace("is", "is ")
    written: list[dict[str, bytes]] = []
    for order in range(3):
        random.Random(order).shuffle(rows)
        prepare.out = tmp_path / f"out{order}"
        prepare(*ace(tmp_path, rows), "--num-train", 20, "--num-test", 10)
        written.append({name: (prepare.out / name).read_bytes() for name in prepare.files()})
    assert written[0] == written[1] == written[2]


def test_another_seed_draws_others(prepare: Command, tmp_path: Path):
    drawn: list[dict[str, list[str]]] = []
    for seed in (42, 43):
        prepare.out = tmp_path / f"out{seed}"
        prepare(*ace(tmp_path, problems(range(30))), *SIZES, "--seed", seed)
        drawn.append(parts(prepare))
    assert {*drawn[0]["test"]} != {*drawn[1]["test"]}


def test_a_part_that_was_given_is_kept_in_an_order_of_the_seed(prepare: Command, tmp_path: Path):
    rows = [{"qid": str(n), "question": f"Is it {n}?", "answer": True} for n in range(20)]
    write_rows(tmp_path / "hub/train.json", rows[:12])
    write_rows(tmp_path / "hub/test.json", rows[12:])
    prepare("strategyqa", "--from", tmp_path / "hub")
    questions = [row["question"] for row in rows]
    written = parts(prepare)
    assert sorted(written["train"]) == sorted(questions[:12]) and written["train"] != questions[:12]
    assert sorted(written["test"]) == sorted(questions[12:])


def test_one_part_alone_is_the_same_as_with_the_other(prepare: Command, tmp_path: Path):
    arguments = ace(tmp_path, problems(range(20)))
    prepare(*arguments, *SIZES)
    both, prepare.out = prepare.out, tmp_path / "alone"
    prepare(*arguments, *SIZES, "--split", "test")
    assert prepare.files() == ["test.jsonl"]
    assert (prepare.out / "test.jsonl").read_bytes() == (both / "test.jsonl").read_bytes()


def test_all_of_a_part_may_be_asked_for(prepare: Command, tmp_path: Path):
    rows = [{"qid": str(n), "question": f"Is it {n}?", "answer": True} for n in range(501)]
    file = write_rows(tmp_path / "test.json", rows)
    arguments = ("strategyqa", "--from", file, "--split", "test")
    assert "test.jsonl 500;" in prepare(*arguments)
    prepare.out = tmp_path / "whole"
    assert "test.jsonl 501;" in prepare(*arguments, "--num-test", "all")


# --- duplicates ----------------------------------------------------------------------------------


def test_a_question_is_written_once_whatever_its_spaces_and_case(prepare: Command, tmp_path: Path):
    rows = problems(range(14))
    again = [
        {"problem": "what  is\n0 +0?", "answer": "0"},
        {"problem": " WHAT IS 1 + 1 ? ", "answer": "2"},
    ]
    line = prepare(*ace(tmp_path, [*rows, *again]), "--num-test", 4)
    assert sum(map(len, parts(prepare).values())) == 14
    assert line.endswith("read 16 rows of 1 files; left out: 2 duplicates")


def test_a_question_with_two_answers_is_not_written(prepare: Command, tmp_path: Path):
    rows = [*problems(range(14)), {"problem": "What is 3 + 3?", "answer": "7"}]
    line = prepare(*ace(tmp_path, rows), "--num-test", 4)
    assert "What is 3 + 3?" not in [*itertools.chain(*parts(prepare).values())]
    assert line.endswith("left out: 1 duplicates, 1 same question, another answer")


def test_what_train_and_test_share_is_only_in_test(prepare: Command, tmp_path: Path):
    train = [{"qid": str(n), "question": f"Is it {n}?", "answer": True} for n in range(5)]
    test = [{"qid": "x", "question": "Is it  3?", "answer": True}]
    write_rows(tmp_path / "hub/train.json", train)
    write_rows(tmp_path / "hub/test.json", test)
    for split in ([], ["--split", "train"]):
        prepare.out = tmp_path / f"out{len(split)}"
        line = prepare("strategyqa", "--from", tmp_path / "hub", *split)
        assert sorted(parts(prepare)["train"]) == [f"Is it {n}?" for n in (0, 1, 2, 4)]
        assert "1 also in test" in line


def test_prompts_of_other_files_can_be_left_out(prepare: Command, tmp_path: Path):
    prepared = [
        write_rows(tmp_path / f"{n}.jsonl", [{"id": "a", "prompt": f"what is {n} + {n}?"}])
        for n in (2, 5)
    ]
    line = prepare(*ace(tmp_path, problems(range(14))), "--num-test", 4, "--without", *prepared)
    written = {*itertools.chain(*parts(prepare).values())}
    assert written == {row["problem"] for row in problems({*range(14)} - {2, 5})}
    assert line.endswith("left out: 2 in a file of --without")


def test_texts_that_differ_in_more_have_other_keys():
    same = ["Caf\u00e9 2 x", "cafe\u0301  2\nX"]
    others = ["Caf\u00e9 2 y", "Caf\u00e9 \u00b2 x", "Caf\u00e9 2 x?"]
    assert len({key_of(text) for text in same}) == 1
    assert len({key_of(text) for text in [same[0], *others]}) == 4


def test_every_row_is_written_or_counted(prepare: Command, tmp_path: Path):
    rows: list[dict[str, Any]] = [*problems(range(30)), *problems([1, 2])]
    rows += [{"problem": "", "answer": "1"}, {"problem": "P", "answer": None}]
    rows += [{"problem": "What is 5 + 5?", "answer": "11"}, {"problem": " ", "answer": "1"}]
    line = prepare(*ace(tmp_path, rows), *SIZES)
    written, counted = line.split("read 36 rows of 1 files; ")
    assert "train.jsonl 8, test.jsonl 4" in written
    assert 12 + sum(map(int, re.findall(r"\b(\d+) [a-z]", counted))) == 36


# --- what is wrong -------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_not_written_to(
    prepare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ace(tmp_path, problems(range(14)))
    prepare(*arguments, "--num-test", 4)
    before = (prepare.out / "test.jsonl").read_bytes()
    words = [*map(str, arguments), "--num-test", "5", "--out", str(prepare.out)]
    assert main(words) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert (prepare.out / "test.jsonl").read_bytes() == before


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "json", "csv"])
def test_a_missing_column_is_named_with_those_that_are_there(
    prepare: Command, tmp_path: Path, suffix: str
):
    file = tmp_path / f"math.{suffix}"
    if suffix == "csv":
        file.write_text("question,answer\nQ,1\n")
    else:
        write_rows(file, [{"question": "Q", "answer": "1"}])
    line = prepare.refused("acereason-math", "--from", file)
    row = "" if suffix == "parquet" else ": row 1"
    assert line == (
        f"{file}{row} has no column 'problem'; it has 'question', 'answer'. Is it a file of "
        "nvidia/AceReason-Math?"
    )


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"problem": "P", "answer": "1"}\n{"problem"', "line 2 is no JSON ("),
        ("a.jsonl", b"[1]\n", "row 1 is no object"),
        ("a.jsonl", b'{"problem": "\xff", "answer": 1}', "behind row 0 is no UTF-8 text ("),
        (
            "a.jsonl",
            b'{"problem": ["P"], "answer": 1}',
            "row 1: 'problem' must be a text, not list",
        ),
        ("a.json", b"[{]", "is no JSON ("),
        ("a.csv", b'problem,answer\n"P,1\n', "not readable as CSV ("),
        ("a.parquet", b"PAR1", "not readable as parquet ("),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is git-lfs's pointer"),
        ("a.jsonl", b"", "0 items are left, fewer than 1 for train and 500 for test"),
        ("a.txt", b"", "must end in one of .parquet, .jsonl, .json, .csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(
    prepare: Command, tmp_path: Path, name: str, content: bytes, complaint: str
):
    (tmp_path / name).write_bytes(content)
    line = prepare.refused("acereason-math", "--from", tmp_path / name)
    assert complaint in line
    assert str(tmp_path / name) in line or "items are left" in line


def test_a_path_that_is_not_there_is_refused(prepare: Command, tmp_path: Path):
    line = prepare.refused("gsm8k", "--from", tmp_path / "no")
    assert line == f"{tmp_path}/no: no such file or folder"


def test_a_folder_without_the_set_s_files_says_what_they_are_called(
    prepare: Command, tmp_path: Path
):
    (tmp_path / "hub").mkdir()
    line = prepare.refused("strategyqa", "--from", tmp_path / "hub")
    assert line == (
        f"{tmp_path}/hub: no file named train-*.parquet or train.json in it, as ChilleD/StrategyQA "
        "has"
    )


def test_a_file_of_one_part_is_not_taken_for_both(prepare: Command, tmp_path: Path):
    rows = [{"qid": "1", "question": "Is it?", "answer": True}]
    test, other = write_rows(tmp_path / "test.json", rows), write_rows(tmp_path / "x.json", rows)
    holds = f"{test}: holds the test part alone; name the folder, or --split test"
    assert prepare.refused("strategyqa", "--from", test) == holds
    assert prepare.refused("strategyqa", "--from", test, "--split", "train") == holds
    unclear = prepare.refused("strategyqa", "--from", other)
    assert unclear == f"{other}: is it train or test? Say which (--split), or name the folder"
    prepare("strategyqa", "--from", other, "--split", "train")
    assert prepare.files() == ["train.jsonl"]


def test_a_part_of_which_nothing_is_left_is_refused(prepare: Command, tmp_path: Path):
    row = {"problem": "P", "level": "Level 4", "solution": "\\boxed{1}"}
    file = write_rows(tmp_path / "test-0.parquet", [row])
    line = prepare.refused("math-level5", "--from", file, "--split", "test")
    assert line == "nothing is left for test; left out: 1 other level"


def test_a_pool_that_is_too_small_is_refused(prepare: Command, tmp_path: Path):
    line = prepare.refused(*ace(tmp_path, problems(range(11))), *SIZES)
    assert line.startswith("11 items are left, fewer than 8 for train and 4 for test (--num-train")


@pytest.mark.parametrize("words", [["--split", "train"], ["--num-train", "5"]])
def test_an_evaluation_s_problems_are_not_for_training(
    prepare: Command, tmp_path: Path, words: list[str]
):
    file = write_rows(tmp_path / "test.jsonl", problems(range(3)))
    line = prepare.refused("math-500", "--from", file, *words)
    assert line == "math-500 is for evaluation only: it has no train part"


def test_a_pool_cannot_be_all_test(prepare: Command, tmp_path: Path):
    line = prepare.refused(*ace(tmp_path, problems(range(9))), "--num-test", "all")
    assert line == "--num-test all would leave nothing for train: say how many"


@pytest.mark.parametrize(
    "words", [["gsm9k", "--from", "x"], ["gsm8k"], ["gsm8k", "--from", "x", "--num-test", "0"]]
)
def test_words_that_mean_nothing_are_one_line(
    prepare: Command, capsys: pytest.CaptureFixture[str], words: list[str]
):
    with pytest.raises(SystemExit) as stopped:
        prepare(*words)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# --- hub -----------------------------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_is_one_line(
    prepare: Command, monkeypatch: pytest.MonkeyPatch
):
    def unreachable(*_: object, **__: object) -> str:
        raise FileNotFoundError("no connection\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert prepare.refused("gsm8k", "--from", "hub") == (
        "--from hub: openai/gsm8k could not be downloaded (no connection); download its files "
        "where there is a network, and give their folder"
    )


def test_what_the_hub_gives_is_read_as_a_folder(
    prepare: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_rows(tmp_path / "hub/test.jsonl", problems(range(3)))
    asked: list[Any] = []

    def download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    prepare("math-500", "--from", "hub")
    assert asked == [("HuggingFaceH4/MATH-500", "dataset", ["test.jsonl", "*/test.jsonl"])]
    assert len(answers(prepare.out / "test.jsonl")) == 3
    assert json.loads((prepare.out / "test.jsonl").read_text().splitlines()[0])["answer"]

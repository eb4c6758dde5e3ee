"""The examples' data: reproducible, disjoint, right; and thoughts found where tokens hide them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_srpo.config_file import load_config
from megatron_srpo.config_method import ThoughtConfig
from megatron_srpo.extensions import find
from megatron_srpo.thoughts import split_thoughts
from megatron_srpo.tokenizer import HFTokenizer
from megatron_srpo.types import Prompt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def write(name: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "chain_arithmetic"
    assert write("chain_arithmetic.py", out).returncode == 0
    return out


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "chain_words"
    assert write("chain_words.py", out).returncode == 0
    return out


def test_the_same_seed_writes_the_same_bytes(characters: Path, tmp_path: Path) -> None:
    assert write("chain_arithmetic.py", tmp_path / "again").returncode == 0
    files = sorted(path.relative_to(characters) for path in characters.rglob("*") if path.is_file())
    for file in files:
        assert (characters / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_no_held_out_problem_was_trained_on(characters: Path) -> None:
    held_out = {row["prompt"] for row in rows(characters, "eval")}
    trained = {row["prompt"] for row in rows(characters, "train")}
    shown = {row["prompt"].split("\n")[0] + "\n" for row in rows(characters, "sft")}
    shown |= {row["prompt"].split("\n")[0] + "\n" for row in rows(characters, "localize")}
    assert len(held_out) == 512 and len(trained) == 4096
    assert not held_out & trained and not held_out & shown
    ids = [row["id"] for name in ("train", "eval") for row in rows(characters, name)]
    assert len(set(ids)) == len(ids)


def test_solutions_are_the_arithmetic_s(characters: Path) -> None:
    for row in rows(characters, "eval"):
        text, digit, right = row["prompt"].strip(), int(row["prompt"][0]), []
        for sign, operand in zip(text[1::2], text[2::2], strict=True):
            total = {"+": digit + int(operand), "-": digit - int(operand)}
            digit = total.get(sign, digit * int(operand)) % 10
            right.append(str(digit))
        assert row["solution"] == [*right, right[-1]] and row["answer"] == right[-1]


def test_a_finished_folder_is_kept_and_a_foreign_one_is_refused(
    characters: Path, tmp_path: Path
) -> None:
    before = (characters / "train.jsonl").stat().st_mtime_ns
    assert write("chain_arithmetic.py", characters).returncode == 0
    assert (characters / "train.jsonl").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("")
    refused = write("chain_arithmetic.py", tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["characters", "words"])
def test_text_survives_the_tokenizer(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    tokenizer = HFTokenizer(folder / "model")
    for row in rows(folder, "sft")[:200]:
        for text in (row["prompt"], row["response"]):
            assert "".join(tokenizer.pieces(tokenizer.encode(text))) == text


def test_thoughts_end_in_the_middle_of_tokens_and_are_found_all_the_same(words: Path) -> None:
    tokenizer = HFTokenizer(words / "model")
    mark = tokenizer.encode("</thought>").tolist()
    solved = [row["response"] for row in rows(words, "sft") if "answer is" in row["response"]]
    for response in solved[:200]:
        token_ids = np.append(tokenizer.encode(response), np.int32(tokenizer.eos_token_id))
        ids = token_ids.tolist()
        assert not any(ids[i : i + len(mark)] == mark for i in range(len(ids)))
        thoughts = split_thoughts(token_ids, tokenizer, ThoughtConfig(max_tokens=64))
        assert "".join(thought.text for thought in thoughts) == response
        assert [t.text.strip() for t in thoughts] == [
            f"{line}</thought>" for line in response.split("</thought>\n")[:-1]
        ] + [response.split("</thought>\n")[-1]]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_config_is_right(path: Path) -> None:
    assert load_config(path).run_dir.parts[0] == "runs"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "f8"
    assert write("chain_regimes.py", Path("f8"), str(out)).returncode == 0
    return out


def solved(folder: Path) -> list[dict]:
    """Demonstrations of problems that are in no other file, beside their right digits."""
    return [row for row in rows(folder, "sft") if "?" not in row["prompt"]]


def right_digits(prompt: str) -> list[str]:
    digit, right = int(prompt[0]), []
    for sign, operand in re.findall(r"([-+*])(\d)", prompt):
        total = {"+": digit + int(operand), "-": digit - int(operand)}
        digit = total.get(sign, digit * int(operand)) % 10
        right.append(str(digit))
    return [*right, right[-1]]


def test_filler_decides_nothing_and_mistakes_come_late(filled: Path) -> None:
    for row in solved(filled)[:500]:
        lines = row["response"].split("\n")
        assert all(len(line) == 4 and line[1:].strip() == "" for line in lines)
    wrong = [
        [a != b for a, b in zip(map(str.strip, row["response"].split("\n")), right, strict=True)]
        for row in solved(filled)
        if (right := right_digits(row["prompt"]))
    ]
    early = sum(any(each[:4]) for each in wrong) / len(wrong)
    late = sum(any(each) for each in wrong) / len(wrong)
    assert early < 0.06 and 0.7 < late < 0.95


def test_filler_survives_the_tokenizer_a_token_a_character(filled: Path) -> None:
    tokenizer = HFTokenizer(filled / "model")
    for row in rows(filled, "sft")[:200]:
        token_ids = tokenizer.encode(row["response"])
        assert len(token_ids) == len(row["response"])
        assert "".join(tokenizer.pieces(token_ids)) == row["response"]


def test_the_strict_reward_wants_every_thought_right() -> None:
    reward = find(f"{EXAMPLES / 'chain_reward.py'}:all_thoughts", {}, key="reward")
    prompt = Prompt(
        id="p", text="", token_ids=np.zeros(0, np.int32), answer="3", solution=("1", "3", "3")
    )
    assert reward(prompt, "1\n3\n3").correct and reward(prompt, "1 \t\n3\f\n3\v").correct
    for response in ("2\n3\n3", "1\n3", "1\n3\n3\n", "1\n3\n3\n3", ""):
        assert not reward(prompt, response).correct, response


def test_a_variant_does_not_take_another_s_folder(filled: Path) -> None:
    other = write("chain_regimes.py", Path("u8"), str(filled))
    assert other.returncode == 2 and "already holds f8" in other.stderr

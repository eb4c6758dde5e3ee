"""Two evaluations compared problem by problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_srpo.compare import compare
from megatron_srpo.config_file import dump_config
from megatron_srpo.types import InputError
from tests.unit.builders import config


def written(folder: Path, *responses: dict[str, Any], reward: str = "boxed") -> Path:
    folder.mkdir()
    sets = {"math": {"data": "math.jsonl", "reward": reward}}
    (folder / "config.yaml").write_text(dump_config(config(eval={"sets": sets})))
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in responses))
    return folder


def response(id: str, correct: bool, **fields: Any) -> dict[str, Any]:
    score = {"value": float(correct), "correct": correct, "failure": fields.pop("failure", None)}
    known = {"set": "math", "prompt_id": id, "seed": 0, "index": 0, "problem": f"digest of {id}"}
    return known | {"score": score} | fields


def test_only_problems_that_both_answered_are_compared_and_responses_to_one_are_one(
    tmp_path: Path,
):
    first = written(
        tmp_path / "first",
        *(response("a", right, index=i) for i, right in enumerate((True, False))),
        response("b", False),
        response("only here", True),
        response("a", True, seed=None),
    )
    second = written(
        tmp_path / "second",
        response("a", True),
        response("b", True),
        response("b", False, failure="it hung", index=1),
        response("only there", False),
    )
    found = compare(first, second)
    assert [*found.index] == [("math", "sampled")]  # no greedy response in the second
    row = found.loc["math", "sampled"]
    assert (row["num_problems"], row["left_out"]) == (2, 2)
    assert (row["first"], row["second"], row["difference"]) == (0.25, 1.0, 0.75)
    assert (row["low"], row["high"]) == (0.5, 1.0)  # of {.5, 1}, drawn twice


def test_the_interval_is_that_of_paired_differences(tmp_path: Path):
    """Difficulty, which both share, is not in it: a small steady gain is found."""
    rng = np.random.default_rng(0)
    difficulty = rng.random(200)
    drawn = rng.random(200)
    before, after = drawn < difficulty, drawn < difficulty + 0.1
    first = written(tmp_path / "1", *(response(str(i), bool(r)) for i, r in enumerate(before)))
    second = written(tmp_path / "2", *(response(str(i), bool(r)) for i, r in enumerate(after)))
    row = compare(first, second).loc["math", "sampled"]
    differences = after.astype(float) - before
    error = differences.std() / np.sqrt(200)
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["low"] == pytest.approx(differences.mean() - 1.96 * error, abs=0.006)
    assert row["high"] == pytest.approx(differences.mean() + 1.96 * error, abs=0.006)
    assert row["low"] > 0
    swapped = compare(second, first).loc["math", "sampled"]
    assert swapped["difference"] == -row["difference"]


def test_a_run_is_no_better_than_itself(tmp_path: Path):
    one = written(tmp_path / "one", response("a", True), response("b", False))
    row = compare(one, one).loc["math", "sampled"]
    assert (row["difference"], row["low"], row["high"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([response("z", True)], "have no problem in common"),
        ([response("a", True, set="other")], "have no problem in common"),
        ([response("a", True, problem="x")], "problem 'a' of set math is not the same in"),
        ([response("a", True) | {"score": {"x": 1}}], "row 1 is no response of an evaluation"),
        ([{"prompt_id": "a"}], "row 1 has no 'set'"),
        ([], "holds no rows"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
):
    first = written(tmp_path / "first", response("a", True))
    with pytest.raises(InputError, match=message):
        compare(first, written(tmp_path / "second", *rows))
    with pytest.raises(InputError, match="no such config file"):
        compare(first, tmp_path / "nowhere")


def test_verdicts_of_different_rewards_are_not_compared(tmp_path: Path):
    first = written(tmp_path / "first", response("a", True))
    second = written(tmp_path / "second", response("a", True), reward="math_string")
    with pytest.raises(InputError, match=r"set math was judged by boxed in .*, by math_string in"):
        compare(first, second)


def test_seeds_weigh_alike_as_in_the_table(tmp_path: Path):
    one = written(
        tmp_path / "one",
        *(response("a", right, index=i) for i, right in enumerate((True, True, False, False))),
        response("a", True, seed=1),
    )
    assert compare(one, one).loc["math", "sampled"]["first"] == 0.75

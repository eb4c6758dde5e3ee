"""Evaluation sets: which judge, which words; and no problem is trained on and measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.config import Config
from megatron_srpo.evaluate import HeldOut
from megatron_srpo.held_out import check_disjoint, read_held_out
from megatron_srpo.rewards.exact import last_line
from megatron_srpo.types import InputError, Prompt
from tests.unit.builders import TOKENIZER, config, in_place, prompt, text_of

JUDGE = in_place(last_line)


def file(folder: Path, name: str, *prompts: str) -> str:
    rows = [{"prompt": text, "answer": "1"} for text in prompts]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(cfg: Config) -> dict[str, HeldOut]:
    sets, dropped = read_held_out(cfg, TOKENIZER, JUDGE)
    assert not dropped
    return {held_out.name: held_out for held_out in sets}


def test_a_set_has_the_runs_judge_and_answer_format_unless_it_names_its_own(tmp_path: Path):
    sets: dict[str, Any] = {
        "plain": {"data": file(tmp_path, "plain", "a", "b", "c")},
        "letters": {
            "data": file(tmp_path, "letters", "d"),
            "reward": "boxed",
            "answer_format": "A?",
        },
        "more": {"data": file(tmp_path, "more", "e"), "reward": "boxed"},
    }
    cfg = config(
        data={"template": "{prompt}|{answer_format}{delimiter}", "answer_format": "1?"},
        eval={"sets": sets, "num_prompts": 2},
    )
    found = read(cfg)
    assert [text_of(p.token_ids) for p in found["plain"].prompts] == ["a|1?\n", "b|1?\n"]
    assert [text_of(p.token_ids) for p in found["letters"].prompts] == ["d|A?\n"]
    assert [p.text for p in found["plain"].prompts] == ["a", "b"]  # localization asks about these
    assert found["plain"].judge is JUDGE
    assert found["letters"].judge is found["more"].judge  # and so are its processes
    scores = found["letters"].judge.judge([(prompt(), r"\boxed{1}"), (prompt(), "\n1")])
    assert [score.correct for score in scores] == [True, False]


def test_a_set_that_names_an_unknown_reward_is_refused(tmp_path: Path):
    sets = {"s": {"data": file(tmp_path, "s", "a"), "reward": "bxed"}}
    with pytest.raises(InputError, match="bxed"):
        read(config(eval={"sets": sets}))


def refusal(trained: Sequence[Prompt], measured: Sequence[Prompt], reward: str) -> str:
    sets = {"math": {"data": "math.jsonl"}}
    cfg = config(reward=reward, eval={"sets": sets})
    try:
        check_disjoint(trained, [HeldOut(name="math", prompts=measured, judge=JUDGE)], cfg)
    except InputError as error:
        return str(error)
    return ""


def test_a_problem_that_is_trained_on_is_not_measured_on_whatever_its_id():
    trained = [prompt("What is 1 + 1?", id="t1"), prompt("Another", id="t2")]
    assert refusal(trained, [prompt("what  is\n1 + 1?", id="m")], "boxed") == (
        "math.jsonl: problem 'm' is also in train.jsonl, as 't1': take it out of one of them"
    )
    assert not refusal(trained, [prompt("What is 1 + 2?", id="t1")], "boxed")


def program(*outputs: str) -> str:
    tests = [{"input": "1", "output": output} for output in outputs]
    return json.dumps({"tests": tests}, indent=len(outputs))


def test_programs_are_not_measured_by_the_tests_that_they_were_trained_on():
    trained = [prompt("Double it", id="t", answer=program("2", "3", "4"))]
    some = [prompt("Add a number to itself", id="m", answer=program("3", "2"))]
    assert "problem 'm' is also in train.jsonl, as 't'" in refusal(trained, some, "code")
    assert not refusal(trained, some, "boxed")  # other problems may share an answer
    others = [prompt("Add one", id="m", answer=program("2", "5"))]
    assert not refusal(trained, others, "code")


def test_an_answer_without_tests_is_refused_where_programs_are_judged(tmp_path: Path):
    sets = {"programs": {"data": file(tmp_path, "programs", "a"), "reward": "boxed"}}
    sets["programs"]["second_reward"] = "code"
    with pytest.raises(InputError, match=r"programs.jsonl: problem 'row1': the answer .* JSON"):
        read(config(eval={"sets": sets}, sandbox="limits"))

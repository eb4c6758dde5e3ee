"""Prompts come in an order that seed and position determine; a bad file names its bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_srpo.data import (
    EpochOrder,
    PromptSet,
    demonstration_sample,
    read_demonstrations,
    read_prompts,
)
from megatron_srpo.types import InputError, Prompt
from tests.unit.builders import TOKENIZER, prompt, text_of

ROWS = [
    {"id": "a", "prompt": "1+1", "answer": "2", "solution": ["so 2"]},
    {"id": "b", "prompt": "2+2", "answer": "4", "solution": None},
    {"id": "c", "prompt": "éé", "answer": "0", "solution": ["x", "y"]},
]


def prompts(num: int) -> list[Prompt]:
    return [prompt(id=str(index)) for index in range(num)]


def source(num: int = 10, *, seed: int = 3, replica: int = 0, num_replicas: int = 1) -> PromptSet:
    return PromptSet(prompts(num), seed=seed, replica=replica, num_replicas=num_replicas)


def drawn(prompt_set: PromptSet, steps: int, num_prompts: int) -> list[list[str]]:
    return [[p.id for p in prompt_set.next(num_prompts)] for _ in range(steps)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, long_prompts: str = "error") -> tuple[list[Prompt], list[str]]:
    return read_prompts(path, TOKENIZER, max_prompt_tokens=8, long_prompts=long_prompts)


# --- order ---------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, seed: int):
    order = EpochOrder(size, seed)
    for epoch in range(3):
        assert sorted(order[epoch * size + i] for i in range(size)) == [*range(size)]


def test_epochs_and_seeds_are_shuffled_differently():
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        order = EpochOrder(20, seed)
        return tuple(order[number * 20 + i] for i in range(20))

    assert len({epoch(0, 0), epoch(0, 1), epoch(1, 0), tuple(range(20))}) == 4


def test_an_order_can_be_read_at_any_position_in_any_sequence():
    forward, backward = EpochOrder(7, 5), EpochOrder(7, 5)
    assert [forward[i] for i in range(21)] == [backward[i] for i in reversed(range(21))][::-1]


def test_steps_follow_each_other_through_an_epoch_and_then_begin_the_next():
    order = EpochOrder(10, 3)
    expected = [[str(order[first + i]) for i in range(4)] for first in (0, 4, 10, 14, 20)]
    assert drawn(source(10), 5, 4) == expected


@given(st.integers(1, 12), st.integers(1, 12))
def test_no_step_holds_a_prompt_twice(size: int, num_prompts: int):
    for step in drawn(source(size), 6, min(size, num_prompts)):
        assert len(set(step)) == len(step)


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_replicas_together_draw_exactly_what_one_draws(num_replicas: int):
    alone = drawn(source(), 6, 6)
    shares = [
        drawn(source(replica=replica, num_replicas=num_replicas), 6, 6)
        for replica in range(num_replicas)
    ]
    together = [[id for share in step for id in share] for step in zip(*shares, strict=True)]
    assert together == alone


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_stored_position_continues_the_same_order(done: int):
    uninterrupted = drawn(source(), 8, 4)
    first = source()
    drawn(first, done, 4)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = source()
    resumed.load_state_dict(state)
    assert drawn(resumed, 8 - done, 4) == uninterrupted[done:]


def test_a_position_stored_by_two_replicas_continues_with_one():
    uninterrupted = drawn(source(), 4, 4)
    halves = [source(replica=replica, num_replicas=2) for replica in (0, 1)]
    states = [drawn(half, 2, 4) and half.state_dict() for half in halves]
    assert states[0] == states[1]
    resumed = source()
    resumed.load_state_dict(states[0])
    assert drawn(resumed, 2, 4) == uninterrupted[2:]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_become_prompts_in_both_formats(own_cache: Path, suffix: str):
    path = own_cache / f"data{suffix}"
    if suffix == ".jsonl":
        jsonl(path, ROWS)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    found, dropped = read(path)
    assert dropped == []
    assert [(p.id, p.text, p.answer, p.solution) for p in found] == [
        ("a", "1+1", "2", ("so 2",)),
        ("b", "2+2", "4", ()),
        ("c", "éé", "0", ("x", "y")),
    ]
    assert [text_of(p.token_ids) for p in found] == ["1+1", "2+2", "éé"]


def test_rows_without_an_id_are_named_by_their_number_and_numbers_become_text(own_cache: Path):
    path = jsonl(
        own_cache / "d.jsonl", [{"prompt": "a", "answer": 0}, {"prompt": "b", "answer": 7}]
    )
    found, _ = read(path)
    assert [(p.id, p.answer) for p in found] == [("row1", "0"), ("row2", "7")]


def test_chat_messages_go_through_the_chat_template(own_cache: Path):
    messages = [{"role": "user", "content": "1?"}]
    path = jsonl(own_cache / "d.jsonl", [{"prompt": messages, "answer": "1"}])
    with pytest.raises(InputError, match=r"prompt 'row1' has 8 tokens, .*max_prompt_tokens is 7"):
        read_prompts(path, TOKENIZER, max_prompt_tokens=7, long_prompts="error")
    ((only,), _) = read(path)
    assert (only.text, text_of(only.token_ids)) == ("1?", "<user>1?")


@pytest.mark.parametrize("value", [None, "", "absent"])
def test_a_missing_answer_names_its_row(own_cache: Path, value: str | None):
    bad = {"prompt": "y"} if value == "absent" else {"prompt": "y", "answer": value}
    rows = [{"prompt": "x", "answer": "1"}, bad]
    with pytest.raises(InputError, match=r"d\.jsonl: row 2 has no 'answer'"):
        read(jsonl(own_cache / "d.jsonl", rows))


def test_a_file_without_the_column_names_its_first_row(own_cache: Path):
    with pytest.raises(InputError, match="row 1 has no 'prompt'"):
        read(jsonl(own_cache / "d.jsonl", [{"question": "x", "answer": "1"}]))


def test_an_id_that_comes_twice_names_the_later_row(own_cache: Path):
    rows = [{"id": id, "prompt": "x", "answer": "1"} for id in ("a", "b", "a")]
    with pytest.raises(InputError, match="row 3 has the id 'a' of an earlier row"):
        read(jsonl(own_cache / "d.jsonl", rows))


LONG = [
    {"id": "fits", "prompt": "12345678", "answer": "1"},
    {"id": "long", "prompt": "123456789", "answer": "1"},
]


def test_a_prompt_that_is_too_long_is_an_error_that_says_what_to_do(own_cache: Path):
    with pytest.raises(InputError, match=r"'long' has 9 tokens, .* is 8 .*long_prompts=drop"):
        read(jsonl(own_cache / "d.jsonl", LONG))


def test_prompts_that_are_too_long_are_dropped_by_name_if_asked(own_cache: Path):
    found, dropped = read(jsonl(own_cache / "d.jsonl", LONG), "drop")
    assert [p.id for p in found] == ["fits"]
    assert dropped == ["long"]


def test_dropping_every_prompt_is_an_error(own_cache: Path):
    with pytest.raises(InputError, match="every prompt is longer than 8 tokens"):
        read(jsonl(own_cache / "d.jsonl", LONG[1:]), "drop")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("broken.jsonl", b'{"prompt": "x", \n', "row 1 is not readable"),
        ("broken.parquet", b"no parquet", "not readable as parquet"),
        ("empty.jsonl", b"", "holds no rows|not readable"),
        ("data.csv", b"prompt,answer\n1,2\n", r"must end in one of \.jsonl, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_of_one_line_that_names_it(
    own_cache: Path, name: str, content: bytes, message: str
):
    (own_cache / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(own_cache / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.jsonl: no such data file"):
        read(tmp_path / "none.jsonl")


# --- demonstrations ------------------------------------------------------------------------------


def test_demonstrations_end_with_end_of_sequence(own_cache: Path):
    path = jsonl(own_cache / "d.jsonl", [{"prompt": "1+1=", "response": "2"}])
    ((asked, response),) = read_demonstrations(path, TOKENIZER)
    assert (text_of(asked), text_of(response)) == ("1+1=", "2$")


def test_a_demonstration_trains_the_mean_of_its_response_and_nothing_of_its_prompt():
    sample = demonstration_sample(
        "d", TOKENIZER.encode("ab"), TOKENIZER.encode("wxyz"), weight=0.5, count=0.0
    )
    assert text_of(sample.token_ids) == "abwxyz"
    assert sample.loss_weight.tolist() == [0, 0, 0.125, 0.125, 0.125, 0.125]
    assert sample.advantage.tolist() == [1] * 6
    assert np.isnan(sample.logprob).all()
    assert sample.count == 0.0

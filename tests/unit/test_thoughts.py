"""Boundaries are found in the text and fall on tokens, whatever the vocabulary merges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_srpo.config_method import ThoughtConfig
from megatron_srpo.thoughts import body, split_thoughts
from megatron_srpo.types import Thought, Tokens


class Pieces:
    """A tokenizer whose token i adds the i-th of the given pieces."""

    eos_token_id = 0

    def __init__(self, *pieces: str) -> None:
        self._pieces = pieces

    def encode(self, text: str) -> Tokens:
        raise AssertionError("a response is never encoded again")

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> Tokens:
        raise AssertionError("a response is never encoded again")

    def pieces(self, token_ids: Tokens) -> list[str]:
        return [self._pieces[token] for token in token_ids]


def split(
    *pieces: str, delimiter: str = "</x>", max_tokens: int = 99
) -> list[tuple[str, int, bool]]:
    """(text, first token, was cut) of each thought."""
    thoughts = split_thoughts(
        np.arange(len(pieces), dtype=np.int32),
        Pieces(*pieces),
        ThoughtConfig(delimiter=delimiter, max_tokens=max_tokens),
    )
    return [(thought.text, thought.start, thought.was_cut) for thought in thoughts]


def test_a_boundary_falls_behind_the_token_in_which_the_delimiter_ends():
    # The docstring's example: the delimiter is spread over two tokens that also hold neighbours.
    assert split("a", "b</", "x>c", "d") == [("ab</x>c", 0, False), ("d", 3, False)]


def test_a_delimiter_merged_with_the_newline_behind_it_is_found():
    assert split("a", "</x", ">\n\n", "b", "</x", ">\n\n", "c") == [
        ("a</x>\n\n", 0, False),
        ("b</x>\n\n", 3, False),
        ("c", 6, False),
    ]


def test_a_delimiter_that_is_a_token_of_its_own_ends_the_thought_it_stands_behind():
    assert split("a", "</x>", "b", "</x>", "c") == [
        ("a</x>", 0, False),
        ("b</x>", 2, False),
        ("c", 4, False),
    ]


def test_two_delimiters_that_end_in_one_token_make_one_boundary():
    assert split("a", "</x>b</x>", "c", "d") == [("a</x>b</x>", 0, False), ("cd", 2, False)]


def test_a_response_that_ends_with_a_delimiter_has_no_empty_thought_behind_it():
    assert split("a", "</x>") == [("a</x>", 0, False)]
    assert split("a", "</x>", "") == [("a</x>", 0, False)]


def test_an_end_of_sequence_without_text_belongs_to_the_last_thought():
    assert split("a", "</x>", "b", "") == [("a</x>", 0, False), ("b", 2, False)]


def test_a_token_of_an_unfinished_character_opens_the_thought_that_it_is_part_of():
    assert split("a", "</x>", "", "é", "b") == [("a</x>", 0, False), ("éb", 2, False)]


def test_a_response_without_a_delimiter_is_one_thought():
    assert split("a", "b", "c") == [("abc", 0, False)]


def test_a_response_without_text_is_one_thought_without_text():
    assert split("") == [("", 0, False)]


def test_no_tokens_make_no_thoughts():
    assert split() == []


def test_a_thought_that_is_too_long_is_cut_and_says_so():
    assert split(*"abcdefg", max_tokens=3) == [
        ("abc", 0, True),
        ("def", 3, True),
        ("g", 6, False),
    ]


def test_a_delimiter_on_the_last_allowed_token_is_no_cut():
    assert split("a", "b", "</x>", "c", max_tokens=3) == [("ab</x>", 0, False), ("c", 3, False)]


def test_the_length_of_a_thought_is_counted_from_its_own_beginning():
    assert split("a", "</x>", "b", "c", "d", max_tokens=3) == [
        ("a</x>", 0, False),
        ("bcd", 2, False),
    ]


def test_the_last_thought_is_not_cut_where_the_response_ends_with_it():
    assert split("a", "b", "c", max_tokens=3) == [("abc", 0, False)]


def test_a_delimiter_across_a_cut_ends_the_thought_in_which_it_ends():
    assert split("a", "b", "</", "x>", "c", max_tokens=3) == [
        ("ab</", 0, True),
        ("x>", 3, False),
        ("c", 4, False),
    ]


def test_characters_of_a_pattern_are_taken_as_they_are():
    assert split("a", "b", ".", "c", delimiter=".") == [("ab.", 0, False), ("c", 3, False)]


@given(
    st.lists(st.sampled_from(["", "a", "b.", ".", "..", "c.d", "ee"]), min_size=1, max_size=30),
    st.integers(1, 6),
)
def test_thoughts_partition_the_response_for_any_tokens(pieces: list[str], max_tokens: int):
    thoughts = split(*pieces, delimiter=".", max_tokens=max_tokens)
    starts = [start for _, start, _ in thoughts]
    assert "".join(text for text, _, _ in thoughts) == "".join(pieces)
    assert starts == sorted(set(starts)) and starts[0] == 0
    for (text, start, was_cut), end in zip(thoughts, [*starts[1:], len(pieces)], strict=True):
        assert text == "".join(pieces[start:end])
        is_last = end == len(pieces)
        assert is_last or was_cut != ("." in text)
        assert is_last or end - start <= max_tokens
        assert was_cut <= (end - start == max_tokens)
        # A delimiter stands in the last token of a thought only.
        assert "." not in "".join(pieces[start : end - 1]) or (
            is_last and not any(pieces[end - 1 :])
        )


@pytest.mark.parametrize(
    "text, delimiter, expected",
    [
        ("so x = 2</thought>\n", "</thought>", "so x = 2"),
        ("  7 \n", "\n", "7"),
        ("no end", "</thought>", "no end"),
        ("</thought>", "</thought>", ""),
        ("twice</t></t>", "</t>", "twice</t>"),
    ],
)
def test_the_body_of_a_thought_is_its_text_without_delimiter_and_space(
    text: str, delimiter: str, expected: str
):
    assert body(Thought(text=text, start=0), delimiter) == expected

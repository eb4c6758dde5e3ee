"""The words of a box are what its reader sees."""

from __future__ import annotations

import pytest

from megatron_srpo.rewards.boxed_words import boxed_words


@pytest.mark.parametrize(
    "response, words",
    [
        (r"\boxed{\text{deep  sea}}", "deep sea"),
        (r"\boxed{\textbf{\text{ a }} b}", "a b"),
        (r"\boxed{\operatorname{rank}}", "rank"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        ("deep sea", None),
    ],
)
def test_commands_that_only_set_type_are_no_words(response: str, words: str | None):
    assert boxed_words(response) == words

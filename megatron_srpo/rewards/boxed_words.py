r"""What does the last balanced \boxed{...} say, in words?   \text{...} and its like are peeled"""

from __future__ import annotations

import re

from megatron_srpo.rewards.exact import last_boxed

MOST_PEELED = 10
"""Around each other: nobody means more, and thousands would keep the trainer waiting."""
TYPESETTING = re.compile(r"\\(?:text|math|operatorname)[a-z]*\s*\{([^{}]*)\}")


def boxed_words(response: str) -> str | None:
    r"""Runs of white space are one space, none at the ends; None without a box.

    >>> boxed_words(r"\boxed{(\textbf{\text{ B }})}"), boxed_words(r"\boxed{\text{deep  sea}}")
    ('( B )', 'deep sea')
    """
    words = last_boxed(response)
    if words is None:
        return None
    for _ in range(MOST_PEELED):
        words = TYPESETTING.sub(r"\1", words)
    return " ".join(words.split())

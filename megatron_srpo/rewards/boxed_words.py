r"""What does the last balanced \boxed{...} say, in words?   \text{...} and its like are peeled"""

from __future__ import annotations

import re

from megatron_srpo.rewards.exact import last_boxed

TYPESETTING = re.compile(r"\\(?:text|math|operatorname)[a-z]*\s*\{([^{}]*)\}")


def boxed_words(response: str) -> str | None:
    r"""Runs of white space are one space, none at the ends; None without a box.

    >>> boxed_words(r"\boxed{(\textbf{\text{ B }})}"), boxed_words(r"\boxed{\text{deep  sea}}")
    ('( B )', 'deep sea')
    """
    words = last_boxed(response)
    while words is not None and (peeled := TYPESETTING.sub(r"\1", words)) != words:
        words = peeled
    return None if words is None else " ".join(words.split())

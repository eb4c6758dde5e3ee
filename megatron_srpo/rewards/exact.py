"""Does the answer, as text, equal the right one?   The thoughts are not looked at."""

from __future__ import annotations

import re

from megatron_srpo.rewards.verdict import right_if
from megatron_srpo.types import Prompt, Score


def last_line(prompt: Prompt, response: str) -> Score:
    """The answer is what follows the last newline; a response that ends with one has none."""
    return _compare(response.rpartition("\n")[2], prompt)


def boxed(prompt: Prompt, response: str) -> Score:
    r"""The answer is the content of the last balanced \boxed{...}; without one it is wrong."""
    return _compare(last_boxed(response), prompt)


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance.

    >>> last_boxed(r"\boxed{1} or \boxed{\frac{1}{2}} and \boxed{3")
    '\\frac{1}{2}'
    """
    opened: list[int] = []
    begin = end = 0
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace[0] != "}":
            opened.append(0 if brace[0] == "{" else brace.end())
        elif opened and (content := opened.pop()) > begin:
            begin, end = content, brace.start()
    return text[begin:end] if begin else None


def _compare(answer: str | None, prompt: Prompt) -> Score:
    return right_if(answer is not None and answer.strip() == prompt.answer.strip())

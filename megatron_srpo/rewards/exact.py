"""Does the answer, as text, equal the right one?   The thoughts are not looked at."""

from __future__ import annotations

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
    begin = "\\boxed{"
    at = text.rfind(begin)
    while at >= 0:
        depth = 1
        for end in range(at + len(begin), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[at + len(begin) : end]
        at = text.rfind(begin, 0, at)
    return None


def _compare(answer: str | None, prompt: Prompt) -> Score:
    correct = answer is not None and answer.strip() == prompt.answer.strip()
    return Score(value=float(correct), correct=correct)

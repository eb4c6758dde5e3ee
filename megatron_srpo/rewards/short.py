r"""Does the response give the right short answer: a name, a substance, a few words?

An `answer` of which nothing is left to compare has no verdict.
"""

from __future__ import annotations

import re

from megatron_srpo.rewards.boxed_words import boxed_words
from megatron_srpo.rewards.verdict import no_verdict, right_if
from megatron_srpo.types import Prompt, Score


def short(prompt: Prompt, response: str) -> Score:
    r"""The last balanced \boxed{...} must hold the answer, all of it and nothing else; case, white
    space, a final dot and \text{...} and its like make no difference, anything else does. A
    response without a box is wrong.
    """
    answer = _plain(rf"\boxed{{{prompt.answer}}}")
    if not answer:
        return no_verdict("the right answer is empty")
    return right_if(_plain(response) == answer)


def short_lax(prompt: Prompt, response: str) -> Score:
    """The paper's: the answer occurs anywhere in the response, once both are without case and
    punctuation. So "not iron" says iron, "215" says 15, and -1.5 is 15.
    """
    answer = _bare(prompt.answer)
    if not answer:
        return no_verdict(f"the right answer {prompt.answer!r} is nothing but punctuation")
    return right_if(answer in _bare(response))


def _plain(response: str) -> str | None:
    words = boxed_words(response)
    return None if words is None else words.removesuffix(".").rstrip().casefold()


def _bare(text: str) -> str:
    """Letters, digits and underscores, with one space between words."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())

r"""Does the response say yes where the answer is yes, and no where it is no?

`answer` must be yes or no, of either case; anything else has no verdict.
"""

from __future__ import annotations

import re

from megatron_srpo.rewards.boxed_words import boxed_words
from megatron_srpo.rewards.verdict import no_verdict, right_if
from megatron_srpo.types import Prompt, Score


def yes_no(prompt: Prompt, response: str) -> Score:
    r"""The last balanced \boxed{...} must hold the one word, of either case, and nothing else but
    \text{...} and its like around it, and a final dot. A response without a box is wrong.
    """
    return _compare((boxed_words(response) or "").removesuffix("."), prompt)


def yes_no_lax(prompt: Prompt, response: str) -> Score:
    """The paper's: the last word of the response that is yes or no, wherever it stands."""
    words = re.findall(r"\b(?:yes|no)\b", response, re.IGNORECASE)
    return _compare(words[-1] if words else "", prompt)


def _compare(word: str, prompt: Prompt) -> Score:
    answer = prompt.answer.strip().lower()
    if answer not in ("yes", "no"):
        return no_verdict(f"the right answer must be yes or no, not {prompt.answer!r}")
    return right_if(word.lower() == answer)

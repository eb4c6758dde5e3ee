r"""Does the response choose the right letter?

`answer` must be one letter, of either case; anything else has no verdict.
"""

from __future__ import annotations

import re

from megatron_srpo.rewards.boxed_words import boxed_words
from megatron_srpo.rewards.verdict import no_verdict, right_if
from megatron_srpo.types import Prompt, Score

LETTER = re.compile(r"(?:\( ?([A-Z]) ?\)|([A-Z])\)?)\.?", re.IGNORECASE)
LAX = (
    re.compile(r"\\boxed\{([A-J])\}", re.IGNORECASE),
    re.compile(r"answer\s*(?:is|:)\s*\(?([A-J])", re.IGNORECASE),
    re.compile(r"\b([A-J])\s*[.)]\s*$", re.IGNORECASE | re.MULTILINE),
    re.compile(r"(?:^|\s)([A-J])(?:[\s.]|$)", re.MULTILINE),
)
r"""A box of one letter; "answer is X" or "answer: X", where X may be a word's first letter; "X." or
"X)" at a line's end; a capital that stands alone."""


def choice(prompt: Prompt, response: str) -> Score:
    r"""The last balanced \boxed{...} must hold one letter, of either case, and nothing else but
    \text{...} and its like around it, parentheses, a final dot: \boxed{\textbf{(B)}.}, not
    \boxed{B: 12}, not \boxed{B, C}. A response without a box is wrong.
    """
    return _compare(LETTER.fullmatch(boxed_words(response) or ""), prompt)


def choice_lax(prompt: Prompt, response: str) -> Score:
    """The paper's: the first of `LAX` that is found anywhere decides, by its last place.

    It also takes the first letter of "the answer is because" for a choice.
    """
    found = (list(pattern.finditer(response)) for pattern in LAX)
    return _compare(next((matches[-1] for matches in found if matches), None), prompt)


def _compare(match: re.Match[str] | None, prompt: Prompt) -> Score:
    answer = prompt.answer.strip().upper()
    if not re.fullmatch("[A-Z]", answer):
        return no_verdict(f"the right answer of a choice is one letter, not {prompt.answer!r}")
    return right_if(match is not None and match[match.lastindex or 0].upper() == answer)

r"""Is the boxed answer the right one, as normalized text?   the paper's grader

What is compared is the content of the last balanced \boxed{...}; a response without one is wrong.
Both sides are rewritten by the rules with which Hendrycks et al. graded MATH (arXiv 2103.03874) and
which the paper's release applies, and must then be the same characters. It rejects much that is
right (1/2 is 0.5, but 3/4 is not 0.75, and 1,2 is not 2,1) and accepts what looks like a unit:
3 \text{ or } 4 is 3.

Unlike the release, `\boxed 5` and `\fbox{5}` are no boxes, and an unfinished last box does not make
the whole one before it worthless.
"""

from __future__ import annotations

import re

from megatron_srpo.rewards.exact import last_boxed
from megatron_srpo.rewards.verdict import right_if
from megatron_srpo.types import Prompt, Score

SPELLINGS = (
    ("\n", ""),
    (r"\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
)
"""One after the other."""
UNIT = r"\text{ "
"""What follows it is a unit: the text of an answer does not begin with a space."""
UNFINISHED = re.compile(r"\\sqrt(?=\\sqrt|$)|\\frac[^{]?(?=\\frac|$)")
"""A root of nothing, a fraction without a denominator."""
WHOLE = "(0|-?[1-9][0-9]*)"


def math_string(prompt: Prompt, response: str) -> Score:
    """Answers that the rules do not fit, of either side, are compared as they were written."""
    answer = last_boxed(response)
    if answer is None:
        return right_if(False)
    ours, theirs = normalized(answer), normalized(prompt.answer)
    if ours is None or theirs is None:
        return right_if(answer == prompt.answer)
    return right_if(ours == theirs)


def normalized(text: str) -> str | None:
    r"""None if the rules do not fit: two units, \sqrt of nothing, \frac of less than two things.

    >>> normalized(r"x = \dfrac34\text{ cm}"), normalized("0.5"), normalized(r"\sqrt2 \%")
    ('\\frac{3}{4}', '\\frac{1}{2}', '\\sqrt{2}')
    """
    for old, new in SPELLINGS:
        text = text.replace(old, new)
    text, *units = text.split(UNIT)
    if len(units) > 1 or UNFINISHED.search(text):
        return None
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = re.sub(r"^\.", "0.", text)
    text = re.sub(r"^[^=]{0,2}=(?=[^=]*$)", "", text)
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return re.sub(f"^{WHOLE}/{WHOLE}$", r"\\frac{\1}{\2}", text)

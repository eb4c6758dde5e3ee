r"""Is the boxed answer the right one, as mathematics?   by the library Math-Verify

What is compared is the content of the last balanced \boxed{...}, as a whole. A response without a
box is wrong, however plain its answer; of several boxes the last one counts, also where the library
by itself would read "\boxed{1} and \boxed{2}" as a set, or an earlier answer if it cannot read the
last.

Which different answers the library takes for equal is in benchmarks/graders.md: units are not read
(5 m is 5 cm), numbers are rounded to six decimals, {1, 2} is the pair (1, 2).

The library stops itself by SIGALRM, which only a process's main thread can use: in another thread
it raises `ValueError`. The alarm ends whatever sympy computes in Python, not what it would leave to
gmpy2 (`environment.py` keeps it from that): what outlasts the alarm ends by `reward_timeout_s`.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from math_verify import (  # pyright: ignore[reportMissingTypeStubs]
    LatexExtractionConfig,
    parse,
    verify,
)

from megatron_srpo.rewards.exact import last_boxed
from megatron_srpo.rewards.verdict import no_verdict, right_if
from megatron_srpo.types import Prompt, Score

LIMIT_S = 5
"""Whole seconds for each of three: reading the right answer, reading the other, comparing them.
The library's own defaults; usual answers take less than 0.2 s in all."""
BOX = LatexExtractionConfig(boxed_match_priority=0)

# It warns of each answer that took too long, which says nothing about the run.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_verify(prompt: Prompt, response: str) -> Score:
    """An answer that cannot be read or compared within the limits is wrong: a policy that could get
    out of a verdict by writing 9^{9^{9^9}} would learn to.

    A right answer that the library cannot read, or not find equal to itself (1/0), is no fault of
    the response: a `failure`, also for a response that repeats it. If only those who repeat it had
    a verdict, it would always be "correct".
    """
    right = _read(prompt.answer)
    if not verify(right, right, timeout_seconds=LIMIT_S):
        return no_verdict(f"Math-Verify cannot read the right answer {prompt.answer!r}")
    answer = last_boxed(response)
    if answer is None:
        return right_if(False)
    return right_if(verify(right, _read(answer), timeout_seconds=LIMIT_S))


def _read(answer: str) -> list[Any]:
    """One expression of sympy, or none. Nothing is picked from the middle of what is not read."""
    return cast(
        list[Any],
        parse(
            rf"\boxed{{{answer}}}",
            extraction_config=[BOX],
            extraction_mode="first_match",
            fallback_mode="no_fallback",
            parsing_timeout=LIMIT_S,
        ),
    )

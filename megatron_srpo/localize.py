"""SRPO's question, "which thought went wrong first?", and how its answer is read.

    failed rollout -> prompt for the same policy -> its answer -> index of a thought

The policy is told only that the final answer is wrong, never the right one. Template and parser
are chosen in the config; the answer's tokens are never trained on (paper section 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from megatron_srpo.config_method import LocalizeConfig
from megatron_srpo.protocols import Tokenizer
from megatron_srpo.thoughts import body
from megatron_srpo.types import Rollout, Tokens

Verdict = int | Literal["no_error", "unparsed"]
"""Index from 0 of the thought that is blamed, or why there is none."""


def localization_context(
    rollout: Rollout, tokenizer: Tokenizer, cfg: LocalizeConfig, delimiter: str
) -> Tokens:
    """The question about one failed rollout, as tokens."""
    steps = "".join(
        f"Step {number}: {body(thought, delimiter)}\n"
        for number, thought in enumerate(rollout.thoughts, start=1)
    )
    question = cfg.template.format(prompt=rollout.prompt.text, response=rollout.text, steps=steps)
    if cfg.chat:
        return tokenizer.encode_chat([{"role": "user", "content": question}])
    return tokenizer.encode(question)


def parse_boxed(answer: str, num_thoughts: int) -> Verdict:
    r"""The last \boxed{number}: 1..num_thoughts names a thought, 0 says that there is no error.

    >>> parse_boxed(r"Step 2 is fine. \boxed{3}", 5)
    2
    """
    boxed = re.findall(r"\\boxed\{\s*(\d{1,9})\s*\}", answer)
    if not boxed or int(boxed[-1]) > num_thoughts:
        return "unparsed"
    return int(boxed[-1]) - 1 if int(boxed[-1]) else "no_error"


def parse_verdicts(answer: str, num_thoughts: int) -> Verdict:
    """One sign a thought, + right and - wrong, whatever stands between them.

    >>> parse_verdicts("8+3+1-", 9), parse_verdicts("+++", 3), parse_verdicts("++", 3)
    (2, 'no_error', 'unparsed')
    """
    signs = re.findall(r"[+-]", answer)[:num_thoughts]
    if "-" in signs:
        return signs.index("-")
    return "no_error" if len(signs) == num_thoughts else "unparsed"


PARSERS: dict[str, Callable[[str, int], Verdict]] = {
    "boxed": parse_boxed,
    "verdicts": parse_verdicts,
}

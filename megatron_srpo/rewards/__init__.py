"""Is the response right?   (Prompt, response text) -> Score

A new reward is one file here: a function with the signature of `protocols.Reward`.
"""

from __future__ import annotations

from megatron_srpo.protocols import Reward
from megatron_srpo.rewards.exact import boxed, last_line

REWARDS: dict[str, Reward] = {"last_line": last_line, "boxed": boxed}

"""Is the response right?   (Prompt, response text) -> Score

The package's own rewards; one of yours is named in the config, `reward: FILE.py:FUNCTION`.
"""

from __future__ import annotations

from megatron_srpo.protocols import Reward
from megatron_srpo.rewards.exact import boxed, last_line

REWARDS: dict[str, Reward] = {"last_line": last_line, "boxed": boxed}

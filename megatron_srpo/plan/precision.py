"""What is in eight bits?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Of layers' linear maps; embedding, head, norms, attention and log-probs never are."""

    train: bool = False
    """They are multiplied in FP8: each weight has a copy in FP8, and its transpose."""
    param_gather: bool = False
    """FP8 copies are all the weights there are: nothing is kept in bf16 beside the fp32 masters."""
    rollout: bool = False
    """The rollout engine holds and multiplies them in FP8."""

"""What is in FP8?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBits:
    """Of layers' linear maps; embedding, head, norms, attention and log-probs never are."""

    train: bool = False
    """They are multiplied in FP8: each weight has a copy in FP8, and its transpose."""
    first_last_bf16: int = 0
    """So many of the first layers, and so many of the last, are not."""
    param_gather: bool = False
    """FP8 copies are all the weights there are, beside the fp32 masters."""
    rollout: bool = False
    """The rollout engine holds and multiplies them in FP8."""
    token_multiple: int = 1
    """Divides the number of tokens that a process multiplies at a time."""

    def share(self, num_layers: int) -> float:
        """Of the trainer's layers."""
        return self.train * (1 - 2 * self.first_last_bf16 / num_layers)

"""Is the response right?   (Prompt, response text) -> Score

The package's own rewards by name; one of yours is named in the config, `reward: FILE.py:FUNCTION`.
What a name stands for is imported where it runs: nobody pays for a library that it does not use.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from megatron_srpo.extensions import find
from megatron_srpo.protocols import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """A function of this folder."""

    file: str
    in_place: bool = True
    """Only compares texts, in microseconds; False: runs in processes beside the trainer."""

    def load(self, name: str) -> Reward:
        """The function of that name."""
        return getattr(importlib.import_module(f"{__name__}.{self.file}"), name)


REWARDS: dict[str, Own] = {
    "last_line": Own(file="exact"),
    "boxed": Own(file="exact"),
}


def reward_named(name: str, *, key: str = "reward") -> Reward:
    """Raises `InputError` if there is no such reward; `key` is the config field."""
    found = cast(Own | Reward, find(name, REWARDS, key=key))
    return found.load(name) if isinstance(found, Own) else found

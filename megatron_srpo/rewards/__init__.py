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
from megatron_srpo.types import Sandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Where a reward of the package's own is: a file of this folder has a function of its name."""

    file: str
    in_place: bool = True
    """Only compares texts, in microseconds; False: runs in processes beside the trainer."""
    built_by: str | None = None
    """The file has this class instead, which is built with (sandbox=, timeout_s=)."""


REWARDS: dict[str, Own] = {
    "last_line": Own(file="exact"),
    "boxed": Own(file="exact"),
    "math_verify": Own(file="math_verify", in_place=False),
    "math_string": Own(file="math_string"),
    "choice": Own(file="choice"),
    "choice_lax": Own(file="choice"),
    "yes_no": Own(file="yes_no"),
    "yes_no_lax": Own(file="yes_no"),
    "short": Own(file="short"),
    "short_lax": Own(file="short"),
    "code": Own(file="code", in_place=False, built_by="Code"),
}


def reward_named(
    name: str, *, timeout_s: float, sandbox: Sandbox = "namespaces", key: str = "reward"
) -> Reward:
    """Raises `InputError` if there is no such reward, or it cannot do its work here; `key` is the
    config field. For `timeout_s` and `sandbox` see `judge.judge_named`."""
    found = cast(Own | Reward, find(name, REWARDS, key=key))
    if not isinstance(found, Own):
        return found
    module = importlib.import_module(f"{__name__}.{found.file}")
    if found.built_by is None:
        return getattr(module, name)
    return getattr(module, found.built_by)(sandbox=sandbox, timeout_s=timeout_s)

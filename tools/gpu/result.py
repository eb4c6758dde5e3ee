"""What can be said of a check?   pass, fail or not_run, with numbers and bounds"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Numbers = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    name: str
    status: Literal["pass", "fail", "not_run"]
    numbers: Numbers = field(default_factory=dict)
    at_most: Numbers = field(default_factory=dict)
    """Bounds of some of the numbers; none: it was measured, and nothing was asked."""
    reason: str = ""


class NotRun(Exception):
    """What a check needs is not here."""


def not_run(name: str, reason: str) -> Result:
    """It says nothing, and nothing may be said of it."""
    return Result(name=name, status="not_run", reason=reason)


def judged(name: str, numbers: Numbers, at_most: Mapping[str, float] | None = None) -> Result:
    """Passes if every bounded number keeps its bound; NaN keeps none."""
    bounds = dict(at_most or {})
    above = [key for key, bound in bounds.items() if not numbers.get(key, math.nan) <= bound]
    reason = ", ".join(f"{key} {numbers.get(key)} > {bounds[key]}" for key in above)
    status = "fail" if above else "pass"
    return Result(name=name, status=status, numbers=numbers, at_most=bounds, reason=reason)


def run_check(name: str, check: Callable[[], tuple[Numbers, Numbers]]) -> Result:
    """Numbers and bounds of a check, or why there are none."""
    try:
        return judged(name, *check())
    except NotRun as lacking:
        return not_run(name, str(lacking))
    except Exception as failure:  # one broken kernel must not take the others' results with it
        return failed(name, failure)


def failed(name: str, failure: Exception) -> Result:
    """In the first of its words."""
    reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return Result(name=name, status="fail", reason=reason[:300])


def is_lost(device: torch.device) -> bool:
    """After some errors a GPU refuses this process everything."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False

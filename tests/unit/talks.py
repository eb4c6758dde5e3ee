"""A check that is run in a process of its own, which imports no more than it needs."""

from __future__ import annotations

import time

from megatron_srpo.types import InputError
from tools.gpu.result import Result, judged


def talks(name: str) -> list[Result]:
    """Run in a process of its own."""
    if name == "refused":
        raise InputError("this build has no such layers")
    if name == "broken":
        raise RuntimeError("an illegal instruction")
    if name == "slow":
        time.sleep(60)
    return [judged(name, {"x": 1.0}, {"x": 2.0}), judged("other", {})]

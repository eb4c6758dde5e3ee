"""Parts that need the whole package, imported when they are asked for: `kernels` does not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from tools.gpu.result import Result

Task = tuple[str, Callable[[], list[Result]]]
WHERE = {
    "te": ("layers", "te_tasks"),
    "fp8": ("layers", "fp8_tasks"),
    "colocation": ("cycle", "colocation_tasks"),
    "loop": ("cycle", "loop_tasks"),
    "shapes": ("shapes", "tasks"),
}


def tasks_of(part: str, device: torch.device, deadline: float) -> Iterator[Task]:
    module, function = WHERE[part]
    return getattr(importlib.import_module(f"tools.gpu.{module}"), function)(device, deadline)


PARTS = {part: partial(tasks_of, part) for part in WHERE}

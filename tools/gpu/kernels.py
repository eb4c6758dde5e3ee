"""Part `kernels`: are they right, are they fast?   correctness first, then time"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tools.gpu import kernel_correctness, kernel_speed, sanitizer
from tools.gpu.result import Result, run_check

Task = tuple[str, Callable[[], list[Result]]]


def tasks(device: torch.device, deadline: float) -> Iterator[Task]:
    """In the order in which they are worth knowing; those that can be cut short are told until
    when (`time.monotonic`) there is time."""
    for name, check in kernel_correctness.tasks(device):
        yield name, lambda name=name, check=check: [run_check(name, check)]
    yield from kernel_speed.launch_tasks(device)
    yield from kernel_speed.speed_tasks(device)
    yield from sanitizer.tasks(device, deadline)
    yield from kernel_speed.rival_tasks(device, deadline)

"""Where does the initial policy wait until the KL term asks for it?   in host memory

Its weights change places with the current ones, parameter by parameter: one copy in host memory
and one parameter's worth of room is all that a reference costs, and both come back bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ParkedWeights:
    """This rank's shard of the weights as they were when this was built."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._parameters = [p for module in modules for p in module.parameters()]
        pin = torch.cuda.is_available()  # otherwise every swap goes through a bounce buffer
        self._waiting = [
            torch.empty_like(p, device="cpu", pin_memory=pin, requires_grad=False).copy_(p.detach())
            for p in self._parameters
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model is the initial policy; no optimizer step may be taken there."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, waiting in zip(self._parameters, self._waiting, strict=True):
            leaving = parameter.detach().clone()
            parameter.copy_(waiting)  # in place: the optimizer and the buffers know this storage
            waiting.copy_(leaving)

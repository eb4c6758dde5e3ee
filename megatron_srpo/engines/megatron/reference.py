"""Where does the initial policy wait until the KL term asks for it?   in host memory

Its weights change places with the current ones, piece by piece: one copy in host memory and one
piece's worth of room (`parking.PIECE`) is all that a reference costs, and both come back bit by
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_srpo.engines.megatron.parking import HostMemory


class ParkedWeights:
    """This rank's shard of the weights as they were when this was built."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._parameters = [p for module in modules for p in module.parameters()]
        # Unpinned, every swap would go through a bounce buffer.
        self._host = HostMemory(pinned=torch.cuda.is_available())
        self._host.reserve(sum(len(here) for here in self._bytes()))
        for here, waiting in self._host.beside(self._bytes()):
            waiting.copy_(here)

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
        for here, waiting in self._host.beside(self._bytes()):
            leaving = here.clone()
            here.copy_(waiting)  # in place: the optimizer and the buffers know this storage
            waiting.copy_(leaving)

    def _bytes(self) -> Iterator[Tensor]:
        """Of the parameters, where they are."""
        for parameter in self._parameters:
            yield parameter.detach().view(-1).view(torch.uint8)

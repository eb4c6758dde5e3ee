"""Where is a learner's memory while the rollout engine has the GPU?   storages <-> host memory

A tensor stays the object that it was, and so does every view of it: only the storage beneath them
is emptied, and filled again with the same bytes. Megatron's parameters are views of one buffer, its
float32 optimizer parameters are views of the same one, and `main_grad` is a view of another.

Megatron-Core 0.16.1 has calls of its own. Those for gradients do the same and are used
(`DistributedDataParallel.offload_grad_buffers`). The optimizer's (`MegatronOptimizer.
offload_to_cpu`) give every parameter another `.data`: float32 ones are then no view of the model's
any more and its updates go nowhere, without an error; and copies go through pageable memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

PIECE = 2**28
"""Bytes of one piece of host memory. torch makes a power of two of what is pinned at once: 33 GiB
asked for in one would take 64."""


class HostMemory:
    """Room for the bytes of tensors, reserved for the next time. Pinned memory needs a GPU, and
    goes to one alone."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned, self.pieces = pinned, list[Tensor]()

    def reserve(self, num_bytes: int) -> None:
        """The last piece is as small as it can be, until a later call needs more."""
        for index, start in enumerate(range(0, num_bytes, PIECE)):
            size = min(PIECE, num_bytes - start)
            if index < len(self.pieces) and len(self.pieces[index]) >= size:
                continue
            self.pieces[index:] = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)]

    def beside(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of flat tensors of bytes, and the place of each."""
        offset = 0
        for here in tensors:
            done = 0
            while done < len(here):
                piece, start = divmod(offset, PIECE)
                count = min(len(here) - done, PIECE - start)
                yield here[done : done + count], self.pieces[piece][start : start + count]
                done, offset = done + count, offset + count


class Parking:
    """Storages that leave their device together."""

    def __init__(self, *, device: torch.device) -> None:
        """`device` is where the tensors live."""
        self._device, self._host = device, HostMemory(pinned=device.type == "cuda")
        self._away: list[tuple[UntypedStorage, int]] = []
        """And how many bytes each holds when it is back."""

    @property
    def num_bytes(self) -> int:
        """Of what is away."""
        return sum(size for _, size in self._away)

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Until `unpark`, nobody may look at them, nor at any view of them."""
        assert not self._away, "parked already"
        self._away = [(s, s.nbytes()) for s in storages_of(tensors, self._device)]
        self._host.reserve(self.num_bytes)
        for here, there in self._host.beside(self._bytes()):
            there.copy_(here, non_blocking=True)
        self._wait()
        for storage, _ in self._away:
            storage.resize_(0)

    def unpark(self) -> None:
        """Bit by bit what was parked."""
        for storage, size in self._away:
            storage.resize_(size)
        for here, there in self._host.beside(self._bytes()):
            here.copy_(there, non_blocking=True)
        self._wait()
        self._away = []

    def _bytes(self) -> Iterator[Tensor]:
        for storage, _ in self._away:
            yield torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def _wait(self) -> None:
        """For copies: what is freed before they are done may be another's by then."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def storages_of(tensors: Iterable[Tensor], device: torch.device) -> list[UntypedStorage]:
    """Each once, of tensors on such a device that hold something: parked ones do not."""
    here = [t.untyped_storage() for t in tensors if t.device.type == device.type]
    return [*{storage.data_ptr(): storage for storage in here if storage.nbytes()}.values()]


def bytes_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    """That they hold on a device."""
    return sum(storage.nbytes() for storage in storages_of(tensors, device))

"""Host memory that storages go to and come back from; the device is a CPU here."""

from __future__ import annotations

import pytest
import torch

from megatron_srpo.engines.megatron import parking
from megatron_srpo.engines.megatron.parking import Parking, bytes_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that storages cross from one piece of host memory to the next."""
    monkeypatch.setattr(parking, "PIECE", 4099)


def test_host_memory_is_taken_in_pieces_and_used_again():
    tensors = [torch.arange(n, dtype=torch.float32) for n in (1000, 3, 2000)]
    place = Parking(device=CPU)
    for _ in range(2):
        place.park([*tensors, tensors[0][3:5]])
        assert place.num_bytes == 4 * 3003 and bytes_of(tensors, CPU) == 0
        assert [len(piece) for piece in place._host.pieces] == [4099, 4099, 12012 - 2 * 4099]
        pieces = [piece.data_ptr() for piece in place._host.pieces]
        place.unpark()
    for tensor in tensors:
        assert torch.equal(tensor, torch.arange(len(tensor), dtype=torch.float32))
    place.park([*tensors, torch.ones(500)])
    assert [piece.data_ptr() for piece in place._host.pieces][:2] == pieces[:2]
    assert sum(map(len, place._host.pieces)) == 4 * 3503
    place.unpark()


def test_what_is_parked_is_not_parked_again():
    place = Parking(device=CPU)
    place.park([torch.ones(3)])
    with pytest.raises(AssertionError, match="parked already"):
        place.park([torch.ones(3)])

"""What is in use, on a driver and an allocator that the test holds."""

from __future__ import annotations

import pytest
import torch

from megatron_srpo.memory import GIB, LESS, peak_gib, this_process, told


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """In GiB."""
    now = {"free": 100, "reserved": 20, "most": 20, "resets": 0}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (now["free"] * GIB, 140 * GIB))
    monkeypatch.setattr(cuda, "memory_reserved", lambda: now["reserved"] * GIB)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda: now["most"] * GIB)
    monkeypatch.setattr(
        cuda, "reset_peak_memory_stats", lambda: now.update(resets=now["resets"] + 1)
    )
    return now


def test_a_peak_is_what_the_driver_sees_and_what_the_allocator_had_more(driver: dict[str, int]):
    assert peak_gib() == 40  # 20 of them another's: vLLM's, NCCL's, the context's
    driver |= {"free": 60, "reserved": 20, "most": 55}  # 35 were given back to the driver
    assert peak_gib() == 80 + 35
    assert driver["resets"] == 2, "each phase begins anew"


def test_without_a_gpu_it_is_what_the_process_holds():
    assert peak_gib() == pytest.approx(this_process().memory_info().rss / GIB, rel=0.05)


def test_what_no_owner_knows_of_is_said_too(driver: dict[str, int]):
    said = told("train", torch.OutOfMemoryError(), {"weights": 7 * GIB, "optimizer": 0}, None)
    assert said == (
        "out of memory in phase 'train': OutOfMemoryError; of 140.0 GiB, 100.0 are free; held: "
        f"weights 7.0 GiB, all else 33.0 GiB; to need less: {LESS['train']}"
    )

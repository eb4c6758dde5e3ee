"""The thread beside a rank's work, with a real store and real signals, one rank."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_srpo import guard
from megatron_srpo.colocation import Colocation
from megatron_srpo.config_sections import DeadlineConfig
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.signals import SIGNALS
from megatron_srpo.stopping import StopRequested
from megatron_srpo.types import AlarmError, InputError
from megatron_srpo.watchdog import Watchdog
from tests.unit.builders import config


class Ended(BaseException):
    """Instead of the process."""


@dataclass
class Rank:
    """One that is guarded; `ended` holds the exit codes that its process would have ended with."""

    mesh: Any
    folder: RunFolder
    ended: list[int] = field(default_factory=list)
    gpu: Colocation = field(init=False)

    def __post_init__(self) -> None:
        self.gpu = Colocation.on(self.mesh)

    def guarded(self, **deadlines: float) -> guard.Guard:
        dog = Watchdog(cfg=DeadlineConfig(**deadlines))
        return guard.Guard(self.mesh, self.gpu, dog, folder=self.folder)

    def generates(self, for_s: float) -> None:
        """Engine steps until it is stopped."""
        deadline = time.monotonic() + for_s
        with self.gpu.generating():
            while time.monotonic() < deadline and not self.ended:
                self.gpu.points.step()
                time.sleep(0.001)


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    store = dist.HashStore()
    mesh = SimpleNamespace(store=store, rank=0, world_size=1, replica=0)
    rank = Rank(mesh=mesh, folder=RunFolder(tmp_path / "run"))
    rank.folder.create(config())

    def end(code: int) -> None:
        rank.ended.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(guard, "FAREWELL_S", 0.5)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    yield rank


def comes(fact: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + 10
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(fact())


def test_a_signal_stops_the_work_at_its_next_point(rank: Rank):
    with rank.guarded() as watch:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StopRequested):
            rank.generates(for_s=10)
    assert watch.asked_by == "SIGUSR1 (rank 0)" and not rank.ended


def test_signals_at_once_are_one(rank: Rank):
    with rank.guarded():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        with pytest.raises(StopRequested):
            rank.generates(for_s=10)
    assert not rank.ended


def test_a_second_signal_ends_the_process_at_once(rank: Rank, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "ONE_EVENT_S", 0.1)
    with contextlib.suppress(StopRequested), rank.guarded():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        assert comes(lambda: rank.ended)
    assert rank.ended[0] == guard.BROKEN


def test_a_second_signal_is_heard_while_the_ranks_agree(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
):
    """The other rank never says where it is."""
    monkeypatch.setattr(guard, "ONE_EVENT_S", 0.1)
    rank.mesh.world_size = 2
    with rank.guarded():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert comes(lambda: rank.mesh.store.check(["stop/at/0"]))
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert comes(lambda: rank.ended)
    assert rank.ended[0] == guard.BROKEN


def test_who_has_finished_does_not_wait_for_an_agreement(rank: Rank):
    rank.mesh.world_size = 2
    began = time.monotonic()
    with rank.guarded():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert comes(lambda: rank.mesh.store.check(["stop/at/0"]))
    assert not rank.ended and time.monotonic() - began < guard.AGREEMENT_S / 2


def test_ranks_that_cannot_agree_show_where_they_are(rank: Rank, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "AGREEMENT_S", 0.2)
    rank.mesh.world_size = 2
    with rank.guarded():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert comes(lambda: rank.ended)
    assert "cannot agree on where to stop: no 'stop/at/1'" in rank.folder.log.read_text()


def test_a_guard_that_fails_ends_the_process(rank: Rank, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Watchdog, *arguments: object, **more: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(Watchdog, "look", fails)
    with rank.guarded():
        assert comes(lambda: rank.ended)
    assert rank.ended[0] == guard.BROKEN


def test_nothing_is_written_into_a_folder_in_which_no_run_has_begun(rank: Rank, tmp_path: Path):
    rank.folder = RunFolder(tmp_path)
    with rank.guarded(other_s=0.2):
        assert comes(lambda: rank.ended)
    assert not rank.folder.log.exists()


def test_handlers_are_those_of_before_when_the_work_is_done(rank: Rank):
    before = [signal.getsignal(number) for number in SIGNALS]
    with rank.guarded():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_phase_past_its_deadline_ends_the_process_with_its_stacks_in_the_log(rank: Rank):

    def hangs() -> None:
        with rank.gpu.stopwatch.phase("reward"):
            assert comes(lambda: rank.ended)

    with rank.guarded(reward_s=0.3):
        hangs()
    said = rank.folder.log.read_text()
    assert rank.ended[0] == guard.BROKEN
    assert "no sign of life in phase 'reward' for 0.3 s" in said
    assert "in hangs" in said and "rank 0:" in said


def test_a_phase_that_works_has_no_deadline(rank: Rank):
    with rank.guarded(generate_s=0.3), rank.gpu.stopwatch.phase("generate"):
        rank.generates(for_s=1.0)
    assert not rank.ended


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("odd"), guard.BROKEN), (AlarmError("off"), guard.ALARM)]
)
def test_a_rank_that_fails_says_so_to_the_others(rank: Rank, error: Exception, code: int):
    with pytest.raises(type(error)), rank.guarded():
        raise error
    assert rank.mesh.store.check(["trouble"])
    other = Rank(SimpleNamespace(**vars(rank.mesh) | {"rank": 1, "world_size": 2}), rank.folder)
    other.ended = rank.ended
    with other.guarded():
        assert comes(lambda: rank.ended)
    assert rank.ended[0] == code


def test_the_first_rank_writes_down_why_another_failed(rank: Rank):
    other = Rank(SimpleNamespace(**vars(rank.mesh) | {"rank": 1, "world_size": 2}), rank.folder)
    with pytest.raises(ValueError), other.guarded():
        raise ValueError("odd\nnumber")
    with rank.guarded():
        assert comes(lambda: rank.ended)
    assert "stopped: rank 1 on " in rank.folder.log.read_text()
    assert "ValueError: odd number\n" in rank.folder.log.read_text()


def test_what_the_user_gave_wrong_is_said_by_every_rank_itself(rank: Rank):
    with pytest.raises(InputError), rank.guarded():
        raise InputError("no such file")
    assert not rank.mesh.store.check(["trouble"])


def test_what_fails_only_because_another_rank_is_gone_ends_with_that_ones_code(rank: Rank):
    other = Rank(SimpleNamespace(**vars(rank.mesh) | {"rank": 1, "world_size": 2}), rank.folder)
    with pytest.raises(AlarmError), other.guarded():
        raise AlarmError("the disk is full")
    with pytest.raises(Ended), rank.guarded():
        raise RuntimeError("Connection closed by peer")
    assert rank.ended == [guard.ALARM]


def test_so_it_does_if_the_store_is_gone_too(rank: Rank, monkeypatch: pytest.MonkeyPatch):
    first = rank.guarded()
    second = Rank(SimpleNamespace(**vars(rank.mesh) | {"rank": 1, "world_size": 2}), rank.folder)
    second.ended = rank.ended
    monkeypatch.setattr(guard, "FAREWELL_S", 5.0)

    def gone(*arguments: Any) -> None:
        raise dist.DistError("gone")

    with pytest.raises(Ended), second.guarded() as guarded:
        with pytest.raises(AlarmError), first:
            raise AlarmError("the disk is full")
        assert comes(lambda: guarded._heard)
        monkeypatch.setattr(guarded, "_report", gone)
        raise RuntimeError("Connection closed by peer")
    assert rank.ended == [guard.ALARM]

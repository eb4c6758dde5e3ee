"""Signals come to whoever waits for them, and to nobody else."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import get_context

from megatron_srpo.signals import heard, listening


def test_signals_are_heard_by_name_in_their_order():
    with listening() as inbox:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard(inbox, within=5) == ["SIGTERM", "SIGUSR1"]
        assert heard(inbox, within=0) == []


def test_an_alarm_clock_of_somebody_else_is_not_meant():
    rang = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rang.set())
    with listening() as inbox:
        os.kill(os.getpid(), signal.SIGALRM)
        assert heard(inbox, within=5) == [] and rang.is_set()
    signal.signal(signal.SIGALRM, before)


def test_a_forked_process_ends_by_its_own_signals_and_its_parent_hears_nothing():
    with listening() as inbox:
        child = get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.5)  # until it runs
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
        assert heard(inbox, within=0.1) == []


def test_threads_hear_nothing():
    found: list[list[str]] = []

    def listens() -> None:
        with listening() as inbox:
            found.append(heard(inbox, within=0))

    thread = threading.Thread(target=listens)
    thread.start()
    thread.join()
    assert found == [[]]

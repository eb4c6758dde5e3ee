"""A phase without a sign of life is named; one that works may take as long as it wants."""

from __future__ import annotations

from megatron_srpo.config_sections import DeadlineConfig
from megatron_srpo.watchdog import Watchdog, stacks

CFG = DeadlineConfig(
    generate_s=10, reward_s=2, wait_s=50, train_s=20, sync_s=7, save_s=5, other_s=9
)


def test_each_phase_has_its_deadline():
    dog = Watchdog(cfg=CFG)
    assert {phase: dog.deadline(phase) for phase in ("generate", "suffix", "localize", "eval")} == {
        "generate": 10,
        "suffix": 10,
        "localize": 10,
        "eval": 10,
    }
    others = ("reward", "wait", "train", "sync", "journal", "checkpoint", "other", "unheard of")
    assert [dog.deadline(phase) for phase in others] == [2, 50, 20, 7, 5, 5, 9, 9]


def test_what_shows_no_sign_is_named_after_its_deadline_and_not_before():
    dog = Watchdog(cfg=CFG)
    assert dog.look("sync", ("sync", 1), now=100.0) is None
    assert dog.look("sync", ("sync", 1), now=107.0) is None
    late = dog.look("sync", ("sync", 1), now=107.5)
    assert late is not None and "phase 'sync' for 7 s" in late


def test_every_sign_starts_the_time_anew():
    dog = Watchdog(cfg=CFG)
    for second in range(0, 100, 5):
        assert dog.look("sync", ("sync", second), now=float(second)) is None


def test_stacks_name_the_function_that_runs():
    assert "test_stacks_name_the_function_that_runs" in stacks()

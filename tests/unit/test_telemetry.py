"""The terminal of a run says where it is, how it learns, and what the package warned of."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from megatron_srpo.config_sections import LogConfig
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.telemetry import NUM_BARS, Log, Telemetry, sparkline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_shares_of_the_highest_one():
    assert sparkline([0.0, 0.124, 0.126, 0.5, 0.99, 1.0]) == "▁▁▂▅██"
    assert sparkline([]) == ""


def test_the_last_alarm_is_the_package_s_own(tmp_path: Path):
    log = Log(tmp_path / "log.txt")
    for name, text in (
        ("megatron_srpo.replica", "the reward failed\nand how"),
        ("py.warnings", "is deprecated"),
    ):
        log.emit(logging.LogRecord(name, logging.WARNING, "", 0, text, None, None))
    assert log.last_alarm == "the reward failed"
    assert "is deprecated" in (tmp_path / "log.txt").read_text()


def test_a_terminal_shows_step_phase_pass_rates_and_the_last_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    stopwatch = Stopwatch()
    telemetry = Telemetry(
        RunFolder(tmp_path), LogConfig(), name="train self", num_steps=60, stopwatch=stopwatch
    )
    with stopwatch.phase("localize"), telemetry:  # drawn a last time before the phase ends
        for step in range(40):
            if step == 20:
                logging.getLogger("megatron_srpo.replica").warning("a reward [red] failed")
            telemetry.log(step, {"pass_rate/base": 0.99 if step >= 30 else 0.0}, "reward 0.50")
    shown = terminal.getvalue()
    assert "40/60" in shown and "localize" in shown and "reward 0.50" in shown
    assert "▁" * (NUM_BARS - 10) + "█" * 10 in shown
    assert "▁" * (NUM_BARS - 9) + "█" * 10 not in shown
    assert "a reward [red] failed" in shown

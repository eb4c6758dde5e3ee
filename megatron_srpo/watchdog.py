"""Does a phase take longer than it may?   signs of life -> the phase that shows none

Whoever works gives a sign with every change of phase, engine step and micro-batch. The deadline is
for the time without one, so that it need not know how long a step's work is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import tempfile
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from megatron_srpo.config_sections import DeadlineConfig

STDERR = 2


@dataclass(slots=True, kw_only=True)
class Watchdog:
    cfg: DeadlineConfig
    _sign: Hashable = None
    _since: float = field(default=0.0)

    def deadline(self, phase: str) -> float:
        """Seconds that a phase of the stopwatch may take without a sign of life."""
        cfg = self.cfg
        engine = dict.fromkeys(("generate", "suffix", "localize", "eval"), cfg.generate_s)
        saving = dict.fromkeys(("journal", "checkpoint"), cfg.save_s)
        others = {"reward": cfg.reward_s, "train": cfg.train_s, "sync": cfg.sync_s}
        return {**engine, **saving, **others, "wait": cfg.wait_s}.get(phase, cfg.other_s)

    def look(self, phase: str, sign: Hashable, *, now: float) -> str | None:
        """What is wrong, if anything; `now` in seconds, `sign` any value that changes with work."""
        if sign != self._sign:
            self._sign, self._since = sign, now
        deadline = self.deadline(phase)
        if now - self._since <= deadline:
            return None
        return f"no sign of life in phase {phase!r} for {deadline:g} s (the config's deadlines)"

    def rearm(self, phase: str) -> None:
        """Should Python itself stand still, a thread of C ends the process, stacks first."""
        faulthandler.dump_traceback_later(self.deadline(phase) + 1, exit=True, file=STDERR)

    def rest(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._sign = None


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Where no guard listens: a process that is still inside by then shows its stacks and ends."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def stacks() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        with contextlib.suppress(ValueError):  # a thread that ends meanwhile
            faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()

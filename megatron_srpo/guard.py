"""Who listens while a rank works?   signals, deadlines, other ranks' troubles -> stop or end

A thread beside each rank's work. What it hears it tells the other ranks through the store, never
by a collective: the work may be in one, or hang.

    a signal            all ranks agree on where to stop (`stopping.py`), and the run saves itself
    a second one        the process ends at once
    a missed deadline   every rank's stacks go to its standard error and to log.txt; all end
    a rank that fails   log.txt says which and why; the others end
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch.distributed import DistError

from megatron_srpo.colocation import Colocation
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.exit_codes import ALARM, BROKEN
from megatron_srpo.preflight import node_name
from megatron_srpo.rewards.verdict import described
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.signals import heard, listening
from megatron_srpo.stopping import Point, Position, first_unpassed
from megatron_srpo.types import AlarmError, InputError
from megatron_srpo.watchdog import Watchdog, stacks

TICK_S, LOOK_S = 0.25, 0.01
ONE_EVENT_S = 1.0
"""Signals closer together are one: launchers send several kinds at once."""
AGREEMENT_S = 60.0
"""So long the other ranks have to say where they are."""
FAREWELL_S = 10.0
"""So long a rank has to end by itself when another has failed, and to say where it hangs."""


class NoAgreementError(Exception):
    """On where to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why all ranks must end."""

    rank: int
    node: str
    reason: str
    code: int
    hangs: bool

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.reason}"


class Guard:
    """Context manager around the work of one rank."""

    def __init__(
        self,
        mesh: Mesh,
        gpu: Colocation,
        watchdog: Watchdog,
        *,
        folder: RunFolder,
    ) -> None:
        """The first rank writes into the log of `folder`, once a run has begun there."""
        # A connection of its own: in the work's one it would wait with the work.
        self._store = mesh.store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._rank, self._num_ranks = mesh.rank, mesh.world_size
        self._points, self._stopwatch = gpu.points, gpu.stopwatch
        self._watchdog, self._folder = watchdog, folder
        self.asked_by: str | None = None
        """What asked the run to stop."""
        self._heard: Trouble | None = None
        self.asked_at = 0.0
        """When this rank heard of it, by `time.monotonic`."""
        self._first_signal: float | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="guard", daemon=True)

    def __enter__(self) -> Guard:
        self._exits = contextlib.ExitStack()
        self._inbox = self._exits.enter_context(listening())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._left.set()
        self._thread.join()
        # Refusals of what the user gave are raised on all ranks.
        try:
            if error is not None and not isinstance(error, InputError):
                self._part_with(error)
        finally:
            self._watchdog.rest()
            self._exits.close()

    def _part_with(self, error: BaseException) -> None:
        """Says it, unless it is only that another rank is gone."""
        with contextlib.suppress(DistError):
            code = ALARM if isinstance(error, AlarmError) else BROKEN
            self._heard = self._report(described(error), code)
            self._share(self._heard)
            if self._rank == 0:
                self._wait_until_all_know()
        # All ranks may have found the same alarm: each says it.
        first = None if isinstance(error, AlarmError) else self._heard
        if first is not None and first.rank != self._rank:
            self._end(f"ends because of {first}", first.code)

    def _listen(self) -> None:
        try:
            while not self._left.is_set():
                self._hear(within=TICK_S)
                self._look()
        except DistError as error:
            if not self._left.wait(FAREWELL_S):
                self._end(f"the first rank, which serves the others, is gone: {described(error)}")
        finally:
            if not self._left.is_set():  # who works without a guard cannot be stopped
                traceback.print_exc()
                self._end("its guard has failed")

    def _hear(self, *, within: float) -> None:
        """Waits so many seconds for signals."""
        for name in heard(self._inbox, within=within):
            now = time.monotonic()
            if self._first_signal is None:
                self._first_signal = now
                self._store.set("stop/asked", f"{name} (rank {self._rank})")
            elif now - self._first_signal > ONE_EVENT_S:
                self._end(f"{name} again: ends at once")

    def _look(self) -> None:
        if self.asked_by is None and self._store.check(["stop/asked"]):
            self.asked_at = time.monotonic()
            self.asked_by = self._store.get("stop/asked").decode()
            with contextlib.suppress(NoAgreementError):
                self._points.agree(self._exchange)
        phase = self._stopwatch.current
        self._watchdog.rearm(phase)
        sign = (phase, self._stopwatch.num_signs, self._points.num_points)
        late = self._watchdog.look(phase, sign, now=time.monotonic())
        if late is not None:
            self._report(late, BROKEN, hangs=True)
        if self._store.check(["trouble"]):
            self._heard = Trouble(**json.loads(self._store.get("trouble")))
            self._share(self._heard)

    def _exchange(self, position: Position) -> Mapping[int, Point]:
        self._store.set(f"stop/at/{self._rank}", position.dump())
        if self._rank == 0:
            names = [f"stop/at/{rank}" for rank in range(self._num_ranks)]
            positions = [Position.parse(self._await(n, within=AGREEMENT_S)) for n in names]
            self._store.set("stop/points", json.dumps([*first_unpassed(positions).items()]))
        agreed = self._await("stop/points", within=2 * AGREEMENT_S)
        return {replica: Point(*point) for replica, point in json.loads(agreed)}

    def _await(self, name: str, *, within: float) -> bytes:
        """Raises `NoAgreementError` where none is needed any more, or will ever be."""
        deadline = time.monotonic() + within
        while not self._comes(name, within=TICK_S):
            if self._left.is_set() or self._store.check(["trouble"]):
                raise NoAgreementError
            if time.monotonic() > deadline:
                self._report(f"cannot agree on where to stop: no {name!r}", BROKEN, hangs=True)
        return self._store.get(name)

    def _comes(self, name: str, *, within: float) -> bool:
        """Listening meanwhile, which the store's own waiting would not."""
        deadline = time.monotonic() + within
        while not (is_there := self._store.check([name])) and time.monotonic() < deadline:
            self._hear(within=LOOK_S)
        return is_there

    def _report(self, reason: str, code: int, *, hangs: bool = False) -> Trouble:
        """The first trouble counts: which that is."""
        own = Trouble(rank=self._rank, node=node_name(), reason=reason, code=code, hangs=hangs)
        first = self._store.compare_set("trouble", "", json.dumps(asdict(own)))
        return Trouble(**json.loads(first))

    def _share(self, trouble: Trouble) -> None:
        """Says what this rank knows of it, and ends the process unless it ends by itself."""
        words = stacks() if trouble.hangs else ""
        if words:
            print(f"rank {self._rank}: {trouble}\n{words}", file=sys.__stderr__, flush=True)
        self._store.set(f"stacks/{self._rank}", words)
        if self._rank == 0 and (trouble.hangs or trouble.rank != 0):
            self._write(trouble)
            self._store.set("trouble/written", "")
        if trouble.hangs:
            self._comes("trouble/written", within=FAREWELL_S)
        elif self._left.wait(FAREWELL_S):
            return
        self._end(f"ends because of {trouble}", trouble.code)

    def _wait_until_all_know(self) -> None:
        """Before the store, which this rank may serve, is gone."""
        deadline = time.monotonic() + FAREWELL_S
        for rank in range(self._num_ranks):
            self._comes(f"stacks/{rank}", within=max(0.0, deadline - time.monotonic()))

    def _write(self, trouble: Trouble) -> None:
        """Into the log; where somebody hangs, with the stacks of all who answer."""
        lines = [f"stopped: {trouble}"]
        within = FAREWELL_S / 2  # for all together: who waits for this waits twice as long
        for rank in range(self._num_ranks) if trouble.hangs else ():
            began = time.monotonic()
            came = self._comes(f"stacks/{rank}", within=within)
            within -= min(within, time.monotonic() - began)
            said = self._store.get(f"stacks/{rank}").decode() if came else "does not answer\n"
            lines.append(f"rank {rank}:\n{said}")
        if not self._folder.is_begun:  # what is in the folder is another's business
            return
        with contextlib.suppress(OSError), self._folder.log.open("a", encoding="utf-8") as log:
            log.write("\n".join(lines) + "\n")

    def _end(self, why: str, code: int = BROKEN) -> None:
        """At once: no work can keep a process from it."""
        print(f"megatron-srpo: rank {self._rank}: {why}", file=sys.__stderr__, flush=True)
        os._exit(code)

"""A reward in several processes beside the trainer: who is asked about what, and when again?

No thread of the trainer's works for it: somebody calls `advance` now and then, which never waits.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from megatron_srpo.rewards.process import LostError, StartError, Worker
from megatron_srpo.rewards.verdict import RewardError, RewardRaisedError
from megatron_srpo.types import Prompt, Score

NUM_ATTEMPTS = 2
LOOK_S = 0.1
"""Seconds between looks at processes that say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Processes of one reward. One starts when all others are busy, and stays."""

    start: Callable[[], Worker]
    role: str
    """What messages call it."""
    num_workers: int
    """At most."""
    idle: list[Worker] = field(default_factory=list[Worker])

    def begin(self, tick: Callable[[], None]) -> Round:
        """One at a time. `tick` is called when a process has started, answered, or is lost."""
        return Round(self, tick)

    def close(self) -> None:
        """Ends the processes; others start when they are needed."""
        while self.idle:
            self.idle.pop().end()


@dataclass(slots=True, eq=False)
class _Task:
    index: int
    prompt: Prompt
    response: str
    losses: list[str] = field(default_factory=list[str])
    """What became of the processes that were asked about it."""


class Round:
    """Items that are asked about together."""

    def __init__(self, workers: Workers, tick: Callable[[], None]) -> None:
        self._workers, self._tick = workers, tick
        self._queue: deque[_Task] = deque()
        self._busy: dict[int, tuple[Worker, _Task]] = {}
        """By file descriptor."""
        self._scores: dict[int, Score] = {}
        self._num_items = 0
        self._last_look = time.monotonic()

    def put(self, prompt: Prompt, response: str) -> None:
        """Asks about it as soon as a process is free. Raises as `advance` does."""
        self._queue.append(_Task(self._num_items, prompt, response))
        self._num_items += 1
        self.advance()

    @property
    def is_done(self) -> bool:
        return len(self._scores) == self._num_items

    @property
    def scores(self) -> list[Score]:
        """In the order of the items, when all are there."""
        return [self._scores[index] for index in range(self._num_items)]

    @property
    def descriptors(self) -> Sequence[int]:
        """Can be read when there is something to hear."""
        return [*self._busy]

    def advance(self) -> None:
        """Hears what is there to be heard, and asks who is free.

        A process that is lost over an item costs it one more attempt, in a new process; then it has
        a `failure`. Raises `RewardError` if the reward or its file raises, or if no process comes
        to the end of the file.
        """
        while descriptors := ready(self._busy, within_s=0.0):
            for descriptor in descriptors:
                self._attend(descriptor, self._hear)
        now = time.monotonic()
        if now - self._last_look >= LOOK_S:
            self._last_look = now
            for descriptor in [*self._busy]:
                self._attend(descriptor, lambda worker, task: worker.look())
        while self._queue and (self._workers.idle or self._may_start):
            self._give(self._queue.popleft())

    def close(self) -> None:
        """Whoever is still busy ends; nobody will hear the answer."""
        for worker, _ in self._busy.values():
            worker.end()
        self._busy.clear()

    @property
    def _may_start(self) -> bool:
        """One after another: a reward that is fast needs no second one, which shows only then."""
        workers = [worker for worker, _ in self._busy.values()]
        return len(workers) < self._workers.num_workers and all(w.is_started for w in workers)

    def _give(self, task: _Task) -> None:
        """To an idle process; one that has died meanwhile costs nobody an attempt."""
        while self._workers.idle:
            worker = self._workers.idle.pop()
            if not worker.is_gone:
                return self._ask(worker, task)
            worker.end()
        return self._ask_another(task)

    def _ask_another(self, task: _Task) -> None:
        try:
            worker = self._workers.start()
        except StartError as error:
            raise RewardError.over(task.prompt, error, role=self._workers.role) from error
        self._ask(worker, task)

    def _ask(self, worker: Worker, task: _Task) -> None:
        self._busy[worker.fileno()] = (worker, task)
        worker.ask(task.prompt, task.response)

    def _attend(self, descriptor: int, to: Callable[[Worker, _Task], None]) -> None:
        worker, task = self._busy[descriptor]
        try:
            to(worker, task)
        except LostError as error:
            del self._busy[descriptor]
            self._tick()
            self._lose(task, str(error))
        except (RewardRaisedError, StartError) as error:
            raise RewardError.over(task.prompt, error, role=self._workers.role) from error

    def _hear(self, worker: Worker, task: _Task) -> None:
        score = worker.hear()
        self._tick()
        if score is not None:
            del self._busy[worker.fileno()]
            self._scores[task.index] = score
            self._workers.idle.append(worker)

    def _lose(self, task: _Task, what: str) -> None:
        task.losses.append(what)
        if len(task.losses) < NUM_ATTEMPTS:
            self._ask_another(task)
        else:
            failure = f"its process {_in_words(task.losses)}"
            self._scores[task.index] = Score(value=0.0, correct=False, failure=failure)


def ready(descriptors: Iterable[int], *, within_s: float) -> list[int]:
    """Those that can be read, or will never be; waits so long for the first."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(within_s * 1000)]


def _in_words(losses: list[str]) -> str:
    """
    >>> _in_words(["died with signal 9"] * 2), _in_words(["took longer than 1 s", "ended with 3"])
    ('died with signal 9, twice', 'took longer than 1 s, then ended with 3')
    """
    first, second = losses
    return f"{first}, twice" if first == second else f"{first}, then {second}"

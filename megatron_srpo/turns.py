"""Who has the memory of a GPU, trainer or rollout engine?

    phase        trainer                            rollout engine
    syncing      weights; what it lends is parked   weights, then keys and values
    generating   what it does not lend              all
    training     all                                asleep: nothing
    saving       all                                asleep: nothing

Nothing moves unless the phase before had it otherwise. An engine that is asked, or given weights,
while it sleeps is a bug that a GPU would not complain of: here it fails at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from megatron_srpo.protocols import LearnerPart, Parkable, Sleeper


class Turns(Protocol):
    """Gives the memory to whom the next phase needs."""

    @property
    def lends_weights(self) -> bool:
        """The trainer is without its own while the engine has keys and values."""
        ...

    def generate(self) -> None: ...

    def train(self) -> None: ...

    def sync(self) -> None:
        """The trainer can be asked for its weights."""
        ...

    def receive(self) -> None:
        """The engine has room for them."""
        ...

    def answer(self) -> None:
        """They have arrived; the engine can be asked."""
        ...

    def held(self) -> dict[str, int]:
        """Bytes on the device, by owner."""
        ...


class AllStay:
    """`Turns` where there is room for everybody: a CPU."""

    lends_weights = False

    def generate(self) -> None:
        pass

    def train(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def receive(self) -> None:
        pass

    def answer(self) -> None:
        pass

    def held(self) -> dict[str, int]:
        return {}


@dataclass(slots=True, kw_only=True)
class TakeTurns:
    """`Turns` on a GPU."""

    learner: Parkable
    engine: Sleeper
    """Asleep."""
    park: Collection[LearnerPart]
    """What the trainer lends while the engine is awake ..."""
    parked: list[LearnerPart] = field(default_factory=list)
    """... and what of it is away now."""
    _is_awake: bool = field(default=False, init=False)

    @property
    def lends_weights(self) -> bool:
        return "weights" in self.park

    def train(self) -> None:
        self._let_sleep()
        for part in tuple(self.parked):
            self._unpark(part)

    def sync(self) -> None:
        self._let_sleep()
        if "weights" in self.parked:
            self._unpark("weights")
        for part in self.park:
            if part != "weights":
                self._park(part)

    def receive(self) -> None:
        # Keys and values come when all buckets are gone.
        self.engine.wake("weights")
        self._is_awake = True

    def answer(self) -> None:
        if self.lends_weights:
            self._park("weights")
        self.engine.wake("kv_cache")

    def generate(self) -> None:
        assert self._is_awake, "the engine has no weights: a weight sync comes before generation"
        assert {*self.park} == {*self.parked}, f"the trainer still holds more than {self.parked}"

    def held(self) -> dict[str, int]:
        return self.learner.held() | self.engine.held()

    def _let_sleep(self) -> None:
        if self._is_awake:
            self.engine.sleep()
            self._is_awake = False

    def _park(self, part: LearnerPart) -> None:
        if part not in self.parked:
            self.learner.park(part)
            self.parked.append(part)

    def _unpark(self, part: LearnerPart) -> None:
        self.learner.unpark(part)
        self.parked.remove(part)

"""Who asks rewards about many responses?   stream of (Prompt, response) -> list of Score"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_srpo.protocols import Reward
from megatron_srpo.rewards import REWARDS, reward_named
from megatron_srpo.rewards.process import Worker
from megatron_srpo.rewards.verdict import RewardError, checked
from megatron_srpo.rewards.workers import LOOK_S, Workers, ready
from megatron_srpo.types import Prompt, Sandbox, Score


def judge_named(
    name: str,
    *,
    second: str | None = None,
    timeout_s: float,
    num_workers: int,
    sandbox: Sandbox = "namespaces",
) -> RewardJudge:
    """Of the package's own rewards those that only compare texts stay in this process. Costs
    nothing until it is asked.

    `second`: a reward that is asked too, and changes no score; `timeout_s`: for one response;
    `num_workers`: processes of a reward at most; `sandbox`: the weakest in which programs may run.
    Raises `InputError` if there is no such reward, or if this machine has no such sandbox.
    """
    names = {"reward": name} | ({"second_reward": second} if second is not None else {})
    told: dict[str, Any] = {"timeout_s": timeout_s, "sandbox": sandbox}
    rewards: list[InPlace | Workers] = []
    notes: list[str] = []
    for key, each in names.items():
        own, role = REWARDS.get(each), key.replace("_", " ")
        here = reward_named(each, key=key, **told)  # also what runs elsewhere, for what it refuses
        if own is not None and own.in_place:
            rewards.append(InPlace(here, role))
        else:
            start = partial(Worker, each, **told)
            rewards.append(Workers(start=start, role=role, num_workers=num_workers))
        if own is not None and own.built_by is not None:
            notes.append(f"{key}={each}: {here}")
    return RewardJudge(rewards, tuple(notes))


@dataclass(frozen=True, slots=True)
class RewardJudge:
    """Implements `protocols.Judge`."""

    rewards: Sequence[InPlace | Workers]
    """The one that counts, and maybe a second opinion."""
    notes: tuple[str, ...] = ()
    """What the user is told when it is first asked."""

    def judge(
        self, items: Iterable[tuple[Prompt, str]], *, tick: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """`tick` is called whenever a process comes forward. Raises `RewardError`; whatever is
        raised, no process goes on with an item that nobody will hear about."""
        with contextlib.ExitStack() as exits:
            rounds = [exits.enter_context(contextlib.closing(r.begin(tick))) for r in self.rewards]
            for prompt, response in items:
                for round in rounds:
                    round.put(prompt, response)
            while not all(round.is_done for round in rounds):
                ready([fd for round in rounds for fd in round.descriptors], within_s=LOOK_S)
                for round in rounds:
                    round.advance()
        first, *second = (round.scores for round in rounds)
        for opinions in second:
            first = [_compared(*pair) for pair in zip(first, opinions, strict=True)]
        return first

    def close(self) -> None:
        """Ends the processes of its rewards; others start when they are needed."""
        for reward in self.rewards:
            reward.close()


def _compared(score: Score, second: Score) -> Score:
    return replace(score, second_opinion=None if second.failure is not None else second.correct)


@dataclass(frozen=True, slots=True)
class InPlace:
    """A reward that is called when a response comes; what it breaks is the trainer."""

    reward: Reward
    role: str = "reward"

    def begin(self, tick: Callable[[], None]) -> InPlaceRound:
        """As `Workers.begin`."""
        return InPlaceRound(self, [])

    def close(self) -> None:
        """There is nothing to end."""


@dataclass(frozen=True, slots=True)
class InPlaceRound:
    """As `workers.Round`: the answer is there at once."""

    called: InPlace
    scores: list[Score]
    is_done = True
    descriptors: tuple[int, ...] = ()

    def put(self, prompt: Prompt, response: str) -> None:
        with self._naming(prompt):
            self.scores.append(checked(self.called.reward(prompt, response)))

    def advance(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """There is nothing to end."""

    @contextlib.contextmanager
    def _naming(self, prompt: Prompt) -> Generator[None]:
        """Whatever a reward raises; somebody who wants this process to end passes."""
        try:
            yield
        finally:
            error = sys.exception()
            if isinstance(error, Exception):
                raise RewardError.over(prompt, error, role=self.called.role)

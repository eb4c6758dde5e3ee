"""Who asks a reward about many responses?   stream of (Prompt, response) -> list of Score"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from megatron_srpo.extensions import find
from megatron_srpo.protocols import Reward
from megatron_srpo.rewards import REWARDS
from megatron_srpo.rewards.process import ProcessReward
from megatron_srpo.rewards.verdict import RewardError, checked, described
from megatron_srpo.types import Prompt, Score


def judge_named(name: str, *, timeout_s: float) -> RewardJudge:
    """One of the package's own, which only compare texts, or the user's in a process.

    Raises `InputError` if there is no such reward; `timeout_s` is for one response.
    """
    found = find(name, REWARDS, key="reward")
    return RewardJudge(found if name in REWARDS else ProcessReward(name, timeout_s=timeout_s))


@dataclass(frozen=True, slots=True)
class RewardJudge:
    """Implements `protocols.Judge`."""

    reward: Reward

    def judge(
        self, items: Iterable[tuple[Prompt, str]], *, tick: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """`tick` is called when something comes forward. Raises `RewardError`."""
        scores: list[Score] = []
        for prompt, response in items:
            with _naming(prompt):
                scores.append(checked(self.reward(prompt, response)))
            tick()
        return scores


@contextlib.contextmanager
def _naming(prompt: Prompt) -> Generator[None]:
    """Whatever a reward raises; somebody who wants this process to end passes."""
    try:
        yield
    finally:
        error = sys.exception()
        if isinstance(error, Exception):
            raise RewardError(f"the reward of prompt {prompt.id!r} raised {described(error)}")

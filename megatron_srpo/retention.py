"""What keeps the policy able to localize?   demonstrations -> samples beside the policy loss

While rewards change the policy, it forgets how to say which thought went wrong first. Every step
adds the cross entropy of some localizations (`retention.source`):

labelled  of the task's own demonstrations: it needs labels, so a run that has it must say so.
initial   of what the initial policy answered in the first step: there the cross entropy is
          KL(initial || policy) and a constant, estimated from one answer a question.
verified  of the policy's latest answers that were followed by better rollouts than fresh ones.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.data import EpochOrder, demonstration_sample
from megatron_srpo.localize import localization_context
from megatron_srpo.protocols import Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import Group, Reset, Rollout, Sample, Tokens

Demonstration = tuple[Tokens, Tokens]
"""Question and answer, with its end of sequence."""
MOST_VERIFIED = 200
"""Answers that are remembered; older ones are of another policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """In epochs over all demonstrations."""

    demonstrations: Sequence[Demonstration]
    cfg: Config
    replica: int
    num_replicas: int

    def samples(self, step: int, groups: Sequence[Group]) -> list[Sample]:
        """This replica's share; auxiliary samples, divided among the step's updates in turn."""
        order = EpochOrder(len(self.demonstrations), counter_seed(self.cfg.seed, "retention"))
        num = self.cfg.retention.num_samples
        return [
            _sample(position, self.demonstrations[order[position]], self.cfg)
            for position in range(step * num + self.replica, (step + 1) * num, self.num_replicas)
        ]


@dataclass(slots=True, kw_only=True)
class OwnAnswers:
    """Of the policy's own, without labels: `initial` and `verified`."""

    cfg: Config
    tokenizer: Tokenizer
    replica: int
    num_replicas: int
    gather: Callable[[Any], list[Any]]
    """The replicas' values, in their order."""
    _known: deque[Demonstration] = field(default_factory=deque, init=False)
    """The same on all replicas."""

    def __post_init__(self) -> None:
        if self.cfg.retention.source == "verified":
            self._known = deque(maxlen=MOST_VERIFIED)

    def recall(self, end: int, read: Callable[[int], Sequence[Group]]) -> None:
        """What was learned in the steps before `end`, from the journal (`read`: all replicas')."""
        steps = reversed(range(end))
        if self.cfg.retention.source == "initial":
            steps = range(min(end, 1))
        found: list[Demonstration] = []
        for step in steps:  # from the newest on, until no more are remembered
            found = self._worth_keeping(step, read(step)) + found
            if len(found) >= MOST_VERIFIED:
                break
        self._known.extend(found)

    def samples(self, step: int, groups: Sequence[Group]) -> list[Sample]:
        """This replica's share, after it has seen the step's own answers; collective."""
        for share in self.gather(self._worth_keeping(step, groups)):
            self._known.extend(share)
        num = min(self.cfg.retention.num_samples, len(self._known))
        rng = np.random.Generator(np.random.Philox(counter_seed(self.cfg.seed, "retention", step)))
        chosen = rng.choice(len(self._known), size=num, replace=False) if num else []
        return [
            _sample(turn, self._known[index], self.cfg)
            for turn, index in enumerate(chosen)
            if turn % self.num_replicas == self.replica
        ]

    def _worth_keeping(self, step: int, groups: Sequence[Group]) -> list[Demonstration]:
        if self.cfg.retention.source == "initial":
            if step > 0:
                return []
            return [self._demonstration(*asked) for asked in answered(groups)]
        return [self._demonstration(*asked) for asked in answered(groups) if paid(*asked, groups)]

    def _demonstration(self, seed: Rollout, reset: Reset) -> Demonstration:
        cfg = self.cfg
        question = localization_context(seed, self.tokenizer, cfg.localize, cfg.thoughts.delimiter)
        answer = self.tokenizer.encode(reset.answer)
        if reset.num_tokens < cfg.localize.max_tokens:  # it came to its end
            answer = np.append(answer, np.int32(self.tokenizer.eos_token_id))
        return question, answer


def _sample(turn: int, demonstration: Demonstration, cfg: Config) -> Sample:
    return demonstration_sample(
        f"retention/{turn}", *demonstration, weight=cfg.retention.weight, count=0.0, turn=turn
    )


def answered(groups: Sequence[Group]) -> Iterator[tuple[Rollout, Reset]]:
    """The policy's localizations, each with the rollout that it was asked about."""
    rollouts = {rollout.id: rollout for group in groups for rollout in group.rollouts}
    for group in groups:
        for reset in group.resets:
            if reset.answer:
                yield rollouts[reset.seed_id], reset


def paid(seed: Rollout, reset: Reset, groups: Sequence[Group]) -> bool:
    """From where the policy sent it back, rewards were higher on average than from the prompt."""
    if reset.cause != "named" or not reset.thought:
        return False
    rewards: dict[bool, list[float]] = defaultdict(list)
    for group in groups:
        for rollout in group.rollouts if group.prompt.id == seed.prompt.id else ():
            is_suffix = rollout.seed_id == seed.id
            if rollout.score.failure is None and (is_suffix or rollout.num_copied == 0):
                rewards[is_suffix].append(rollout.score.value)
    return bool(rewards[True]) and bool(np.mean(rewards[True]) > np.mean(rewards[False]))

"""One will per replica: what its leader decides, all its ranks do.

The ranks of a rollout engine must send it the same requests, or they wait for each other for ever.
A reward may be a service or a clock, a rule may read a file: only the leader runs them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.protocols import Generator, ResetRule
from megatron_srpo.rewards.judge import RewardJudge
from megatron_srpo.rewards.verdict import RewardError, described
from megatron_srpo.stopping import StopRequested
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.types import AlarmError, Completion, Prompt, Request, Reset, Rollout, Score

LOG = logging.getLogger(__name__)
MOST_LINES = 20
"""About failed rewards at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderJudge:
    """Implements `protocols.Judge`; only the leader asks the reward, and its verdicts count.

    What comes from the engine the others draw as well: an engine's ranks take its steps together.
    """

    inner: RewardJudge
    mesh: Mesh
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    """`reward`: the leader's comparisons, and its wait for verdicts; `wait`: the others' for it."""
    failures: list[str] = field(default_factory=list)
    """On the leader: which prompts' rewards could not be computed, and why, until told."""

    def judge(self, items: Iterable[tuple[Prompt, str]]) -> list[Score]:
        """Raises `AlarmError` on every rank of the replica if the leader's reward raises, or gives
        anything but a `Score` with a finite value. What the items raise they raise on each rank."""
        if not self.mesh.is_leader:
            return self._follow(items)
        seen: list[Prompt] = []
        drawn = _noting(self.stopwatch.drawn(items), seen)
        try:
            with self.stopwatch.phase("reward"):
                scores = self.inner.judge(drawn, tick=self.stopwatch.tick)
        except RewardError as error:
            if self.mesh.num_replicas < self.mesh.world_size:
                for _ in drawn:  # the others hear of it when their engine has come to its end
                    pass
            self.mesh.share(str(error))
            raise AlarmError(str(error)) from error
        self.mesh.share(scores)
        for prompt, score in zip(seen, scores, strict=True):
            if score.failure is not None:
                self.failures.append(f"the reward of prompt {prompt.id!r} failed: {score.failure}")
        return scores

    def _follow(self, items: Iterable[tuple[Prompt, str]]) -> list[Score]:
        for _ in items:
            pass
        with self.stopwatch.phase("wait"):
            said: list[Score] | str = self.mesh.share([])
        if isinstance(said, str):
            raise AlarmError(said)
        return said

    def tell_failures(self) -> None:
        """Collective over all replicas: the first rank's log names those since the last call."""
        told = [line for share in self.mesh.gather(self.failures) for line in share]
        self.failures.clear()
        if self.mesh.rank == 0:
            for line in told[:MOST_LINES]:
                LOG.warning(line)
            if len(told) > MOST_LINES:
                LOG.warning(f"... and {len(told) - MOST_LINES} more, which the journal names")


def _noting(
    items: Iterable[tuple[Prompt, str]], prompts: list[Prompt]
) -> Iterator[tuple[Prompt, str]]:
    for item in items:
        prompts.append(item[0])
        yield item


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRule:
    """Implements `protocols.ResetRule`; only the leader asks the rule.

    What the rule asks of the engine, the other ranks hear of and ask too.
    """

    rule: ResetRule
    mesh: Mesh

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        """Raises `AlarmError` on every rank of the replica if the leader's rule raises."""
        if not self.mesh.is_leader:
            return self._follow(generator)
        resets: list[Reset] | None = None
        try:
            resets = self.rule.choose(seeds, Announced(generator=generator, mesh=self.mesh))
        finally:
            failure = _what_is_raised()
            if not isinstance(sys.exception(), StopRequested):  # the others stop where this one did
                self.mesh.share(Answer(resets=resets, failure=failure))
            if failure is not None and not _is_leaving():
                raise AlarmError(f"the reset rule raised {failure}")
        return resets or []

    def _follow(self, generator: Generator) -> list[Reset]:
        while not isinstance(said := self.mesh.share(None), Answer):
            for _ in generator.generate(said or ()):
                pass
        if said.failure is not None:
            raise AlarmError(f"the reset rule raised {said.failure}")
        return said.resets or []


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The leader's last word on a rule; until then it sends lists of requests."""

    resets: list[Reset] | None
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """Implements `protocols.Generator` for the leader: the replica's other ranks generate along."""

    generator: Generator
    mesh: Mesh

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """To the end, also if nobody looks at it: the others cannot stop half-way."""
        self.mesh.share(list(requests))
        return iter([*self.generator.generate(requests)])


def _what_is_raised() -> str | None:
    """In one line: an exception need not survive the way to another rank."""
    error = sys.exception()
    return None if error is None else described(error)


def _is_leaving() -> bool:
    """Somebody wants this process to end: nothing is wrong with what it was doing."""
    return isinstance(sys.exception(), KeyboardInterrupt | SystemExit | StopRequested)

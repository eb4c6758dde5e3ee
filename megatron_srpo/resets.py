"""Where to go back to: for each failed rollout (seed), the first thought that is not kept.

    seeds -> resets

A new rule is one class, here or in a file of yours: built with (cfg, tokenizer), and `choose` is
all it needs (`protocols.ResetRule`).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from megatron_srpo.config import Config
from megatron_srpo.localize import PARSERS, localization_context
from megatron_srpo.protocols import Generator, ResetRule, Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.thoughts import body
from megatron_srpo.types import AlarmError, Completion, Request, Reset, Rollout


@dataclass(frozen=True, slots=True)
class RandomReset:
    """RRPO: any thought of the seed, uniformly; the first one restarts from the prompt."""

    cfg: Config
    tokenizer: Tokenizer

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        return [
            Reset(seed_id=seed.id, thought=random_thought(seed, self.cfg.seed), cause="random")
            for seed in seeds
        ]


def random_thought(seed: Rollout, run_seed: int) -> int:
    """Index of any of the seed's thoughts, uniformly."""
    return random.Random(counter_seed(run_seed, seed.id, "reset")).randrange(len(seed.thoughts))


@dataclass(frozen=True, slots=True)
class SelfReset:
    """SRPO: the thought that the policy itself names; `localize.fallback` if it names none."""

    cfg: Config
    tokenizer: Tokenizer

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        questions = {seed.id: self._question(seed) for seed in seeds}
        longest = self.cfg.rollout.max_model_len - self.cfg.localize.max_tokens
        asked = [question for question in questions.values() if len(question.context) <= longest]
        answers = {answer.request_id: answer for answer in generator.generate(asked)}
        return [self._read(seed, answers.get(questions[seed.id].id)) for seed in seeds]

    def _question(self, seed: Rollout) -> Request:
        id = f"{seed.id}/localize"
        return Request(
            id=id,
            purpose="localize",
            context=localization_context(
                seed, self.tokenizer, self.cfg.localize, self.cfg.thoughts.delimiter
            ),
            max_tokens=self.cfg.localize.max_tokens,
            temperature=self.cfg.localize.temperature,
            top_p=self.cfg.rollout.top_p,
            seed=counter_seed(self.cfg.seed, id),
        )

    def _read(self, seed: Rollout, answer: Completion | None) -> Reset:
        if answer is None:
            return Reset(seed_id=seed.id, thought=self._fallback(seed), cause="too_long")
        text = "".join(self.tokenizer.pieces(answer.token_ids))
        verdict = PARSERS[self.cfg.localize.parser](text, len(seed.thoughts))
        is_named = isinstance(verdict, int)
        return Reset(
            seed_id=seed.id,
            thought=verdict if is_named else self._fallback(seed),
            cause="named" if is_named else verdict,
            answer=text,
            num_tokens=len(answer.token_ids),
            num_cached_tokens=answer.num_cached_tokens,
        )

    def _fallback(self, seed: Rollout) -> int | None:
        known = {"restart": 0, "random": random_thought(seed, self.cfg.seed), "skip": None}
        return known[self.cfg.localize.fallback]


@dataclass(frozen=True, slots=True)
class DepthMatchedReset:
    """A control: as deep, in share of thoughts, as the policy's verdict on another prompt's seed.

    Depths are distributed as with `SelfReset`, and so is the cost, but a depth says nothing about
    its own seed. Where no other prompt has a seed: any of the seed's thoughts, uniformly.
    """

    cfg: Config
    tokenizer: Tokenizer

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        own = SelfReset(self.cfg, self.tokenizer).choose(seeds, generator)
        resets: list[Reset] = []
        for index, (seed, asked) in enumerate(zip(seeds, own, strict=True)):
            after = [*range(index + 1, len(seeds)), *range(index)]
            other = next((i for i in after if seeds[i].prompt.id != seed.prompt.id), None)
            if other is None:
                thought: int | None = random_thought(seed, self.cfg.seed)
            else:
                thought = _as_deep(seed, own[other].thought, len(seeds[other].thoughts))
            # Why an answer names nothing stays on record; what it names is not what happens.
            cause = "depth_matched" if asked.cause == "named" else asked.cause
            resets.append(replace(asked, thought=thought, cause=cause))
        return resets


def _as_deep(seed: Rollout, named: int | None, num_thoughts: int) -> int | None:
    """The seed's thought that is as deep as thought `named` of `num_thoughts`, rounded down."""
    # In whole numbers: as a float, 15/22 of 22 thoughts is 14.
    return None if named is None else named * len(seed.thoughts) // num_thoughts


@dataclass(frozen=True, slots=True)
class OracleReset:
    """The first wrong thought, from the task's own solution: what perfect localization would do."""

    cfg: Config
    tokenizer: Tokenizer

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        resets: list[Reset] = []
        for seed in seeds:
            thought = first_wrong_thought(seed, self.cfg.thoughts.delimiter)
            assert thought is not None, f"{seed.prompt.id}: the oracle needs a `solution`"
            resets.append(Reset(seed_id=seed.id, thought=thought, cause="oracle"))
        return resets


@dataclass(frozen=True, slots=True)
class DialReset:
    """A control: a localizer that is right with probability `algorithm.dial`, else random; free."""

    cfg: Config
    tokenizer: Tokenizer

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        right = OracleReset(self.cfg, self.tokenizer).choose(seeds, generator)
        anywhere = RandomReset(self.cfg, self.tokenizer).choose(seeds, generator)
        return [
            replace(true if self._is_right(true.seed_id) else other, cause="dial")
            for true, other in zip(right, anywhere, strict=True)
        ]

    def _is_right(self, seed_id: str) -> bool:
        drawn = random.Random(counter_seed(self.cfg.seed, seed_id, "dial")).random()
        return drawn < self.cfg.algorithm.dial


@dataclass(frozen=True, slots=True)
class PromptReset:
    """A control: what was spent on the seed's thoughts is forgotten, as in GRPO."""

    cfg: Config
    tokenizer: Tokenizer

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        return [Reset(seed_id=seed.id, thought=0, cause="prompt") for seed in seeds]


def first_wrong_thought(rollout: Rollout, delimiter: str) -> int | None:
    """Index of the first thought that differs from the solution's; the last if it stops short.

    None where the task does not know the solution.
    """
    solution = rollout.prompt.solution
    if not solution:
        return None
    for index, thought in enumerate(rollout.thoughts):
        if index >= len(solution) or body(thought, delimiter) != solution[index].strip():
            return index
    return len(rollout.thoughts) - 1


RULES: dict[str, Callable[[Config, Tokenizer], ResetRule]] = {
    "none": RandomReset,  # never asked: there are no seeds
    "random": RandomReset,
    "self": SelfReset,
    "oracle": OracleReset,
    "depth_matched": DepthMatchedReset,
    "prompt": PromptReset,
    "dial": DialReset,
}


def checked(resets: Sequence[Reset], seeds: Sequence[Rollout]) -> list[Reset]:
    """The same resets; `AlarmError` unless there is one for each seed, to one of its thoughts."""
    given: Any = resets
    if not isinstance(given, Sequence) or not all(
        isinstance(reset, Reset) for reset in cast(Any, given)
    ):
        raise AlarmError(f"the reset rule must give a list of Resets, not {given!r}")
    good: list[Reset] = []
    if [reset.seed_id for reset in resets] != [seed.id for seed in seeds]:
        raise AlarmError(
            f"the reset rule answered for {[reset.seed_id for reset in resets]}; it was asked for "
            f"one reset for each of {[seed.id for seed in seeds]}, in this order"
        )
    for reset, seed in zip(resets, seeds, strict=True):
        # A rule may count in numpy.
        thought = None if reset.thought is None else operator.index(reset.thought)
        if thought is not None and thought not in range(len(seed.thoughts)):
            raise AlarmError(
                f"the reset rule chose thought {thought} of rollout {seed.id}, which has "
                f"thoughts 0 to {len(seed.thoughts) - 1}"
            )
        good.append(replace(reset, thought=thought))
    return good

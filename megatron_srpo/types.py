"""The nouns: every stage of the project maps some of these values to others. No torch, no engine.

Arrays are numpy and become read-only when they enter a noun: a stage never changes its input.
Shape legend: T tokens of one sequence (`T_response`: without the prompt).
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Stage = Literal["base", "extra", "suffix"]
Purpose = Literal["base", "extra", "suffix", "localize", "eval", "probe"]
Sandbox = Literal["bubblewrap", "namespaces", "limits"]
"""Where programs of a policy run, strongest first."""


class InputError(ValueError):
    """What the user gave is wrong; the message says what, where, and what would be right."""


class AlarmError(RuntimeError):
    """A measured quantity left its stated bounds; the run must not go on as if nothing happened."""


def question_key(question: str) -> str:
    """The same for texts that differ in white space, case or the encoding of an accent."""
    return "".join(unicodedata.normalize("NFC", question).casefold().split())


def freeze_arrays(noun: Any) -> None:
    """Makes every array field of a slotted dataclass read-only."""
    for name in noun.__slots__:
        value = getattr(noun, name)
        if isinstance(value, np.ndarray):
            value.setflags(write=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A question that a reward can check."""

    id: str
    """Unique within its set."""
    text: str
    """The question in words, without a chat template."""
    token_ids: Tokens
    """[T] what the policy sees, chat template applied."""
    answer: str
    """What the reward compares with."""
    solution: tuple[str, ...] = ()
    """The right thoughts, where the task knows them; empty otherwise."""

    def __post_init__(self) -> None:
        freeze_arrays(self)

    @property
    def digest(self) -> str:
        """Of question and right answer: an id may be another problem's in another file."""
        return hashlib.sha256(f"{self.text}\0{self.answer}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One sequence to be continued by the rollout engine."""

    id: str
    """Unique among the requests in flight."""
    purpose: Purpose
    """What it is for: time and tokens are told apart by it."""
    context: Tokens
    """[T] prompt and whatever part of a response is kept."""
    max_tokens: int
    temperature: float
    """0 means greedy."""
    top_p: float = 1.0
    """Sampled from the smallest set of tokens that holds this much probability."""
    seed: int
    """Of this request alone: what is drawn does not depend on its neighbours."""

    def __post_init__(self) -> None:
        freeze_arrays(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """What the rollout engine returns for one request."""

    request_id: str
    token_ids: Tokens
    """[T] a sampled end-of-sequence token included."""
    logprobs: Floats
    """[T] nats, of the distribution that was sampled from, renormalised if `top_p` is below 1."""
    finish_reason: Literal["stop", "length"]
    num_cached_tokens: int
    """Context tokens whose keys and values came from the prefix cache."""
    weight_version: int
    """Number of policy updates that the sampling weights had seen."""

    def __post_init__(self) -> None:
        freeze_arrays(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A reward's verdict."""

    value: float
    correct: bool
    """A rollout that is not correct can be the seed of a reset."""
    failure: str | None = None
    """Why the reward could not be computed; such a rollout has no verdict, not a verdict of 0."""
    second_opinion: bool | None = None
    """What the config's second reward says of `correct`; None if it was not asked or failed.
    Nothing is trained on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """One step of a chain of thought."""

    text: str
    """With its delimiter."""
    start: int
    """Index of its first token in the response."""
    was_cut: bool = False
    """It ended because it grew too long, not at a delimiter."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """A scored response. Its first `num_copied` tokens were sampled by another rollout."""

    id: str
    prompt: Prompt
    stage: Stage
    """base: fresh; extra: fresh, in place of suffixes; suffix: continued from a reset state."""
    token_ids: Tokens
    """[T_response] copied prefix and own tokens."""
    logprobs: Floats
    """[T_response] nats, of whoever sampled the token."""
    num_copied: int
    seed_id: str | None = None
    """The rollout that was reset; its tokens are the copied ones."""
    thoughts: tuple[Thought, ...]
    score: Score
    finish_reason: Literal["stop", "length"]
    num_cached_tokens: int
    weight_version: int

    def __post_init__(self) -> None:
        freeze_arrays(self)

    @property
    def text(self) -> str:
        return "".join(thought.text for thought in self.thoughts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """A state to roll out from: a prompt, and what is kept of a failed response."""

    prompt: Prompt
    stage: Stage
    index: int
    """Tells apart the rollouts that leave the same state."""
    token_ids: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    seed_id: str | None = None
    """The failed rollout."""

    def __post_init__(self) -> None:
        freeze_arrays(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """Where a failed rollout (the seed) is gone back to."""

    seed_id: str
    thought: int | None
    """Index of the first thought that is not kept; 0 restarts from the bare prompt, None resets
    nothing."""
    cause: str
    """What chose it: random, oracle, dial, prompt, named (by the policy), depth_matched, or a
    rule's own word; or why nothing was chosen: the policy's answer was `unparsed`, it said
    `no_error`, or the question was `too_long` for the engine (`localize.fallback` says what happens
    then); `nearer`: a later round left from a state that lies further (`reset_rounds`)."""
    answer: str = ""
    """What the policy said when it was asked."""
    num_tokens: int = 0
    """Generated for that answer; never trained on."""
    num_cached_tokens: int = 0
    moved_from: int | None = None
    """The thought that was chosen, where the offset or too little room made it an earlier one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rollouts that left the same state, hence comparable with each other."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    resets: tuple[Reset, ...] = ()
    """Those that made (some of) these rollouts, or that made none."""
    use: Literal["train", "seeds", "replaced"] = "train"
    """train: learned from. Only on record and in the token counts: seeds, fresh rollouts drawn in
    search of failed ones; replaced, rollouts without signal that were drawn anew."""

    @property
    def has_signal(self) -> bool:
        """Its rewards, those that could be computed, are not all equal but for rounding."""
        rewards = [r.score.value for r in self.rollouts if r.score.failure is None]
        if not rewards:
            return False
        return max(rewards) - min(rewards) > 1e-8 * max(1.0, *map(abs, rewards))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One training sequence, whatever method made it. Entry t speaks of predicting token t."""

    id: str
    token_ids: Tokens
    """[T]"""
    loss_weight: Floats
    """[T] 0: not trained. 1/length for means over sequences, 1 for token means."""
    advantage: Floats
    """[T]"""
    logprob: Floats
    """[T] behaviour policy's, nats; NaN where unknown (demonstrations)."""
    count: float
    """Its share of the global denominator. 0 with a weight: an auxiliary sample, beside the policy
    loss; the loss then holds the mean of all auxiliary samples' weighted sums."""
    turn: int = 0
    """Of n updates in a step, it takes part in number `turn` modulo n."""

    def __post_init__(self) -> None:
        freeze_arrays(self)

    @property
    def is_trained(self) -> bool:
        return bool(np.any(self.loss_weight * self.advantage))

    @property
    def is_auxiliary(self) -> bool:
        return self.count == 0 and self.is_trained


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Sequences laid end to end (THD), one forward pass. Entry t holds what token t predicts.

    Each sequence may end in padding (`PackLayout` says how much), which weighs nothing: 0 in every
    field but `position_ids`.
    """

    token_ids: Tokens
    """[T] inputs"""
    position_ids: Tokens
    """[T] from 0 in each sequence, on into its padding"""
    target_ids: Tokens
    """[T] the next token of the same sequence"""
    loss_weight: Floats
    """[T] of the target"""
    advantage: Floats
    """[T] of the target"""
    logprob: Floats
    """[T] of the target, behaviour policy's"""
    cu_seqlens: Tokens
    """[sequences + 1] where sequences, each with its padding, begin, and the end"""
    sample_ids: tuple[str, ...]
    """Whose sequences these are, for messages."""

    def __post_init__(self) -> None:
        freeze_arrays(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank learns from in one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    """As many as on every other rank, a number that the pipeline takes; none if no sample of any
    rank carries a gradient."""
    denominator: float
    """Sum of `Sample.count` over all samples of all ranks, those without a gradient included."""

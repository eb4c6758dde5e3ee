"""The verbs: one role each, fully supported by every implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from megatron_srpo.types import (
    Batch,
    Completion,
    Floats,
    Group,
    Prompt,
    Request,
    Reset,
    Rollout,
    Score,
    Tokens,
)

if TYPE_CHECKING:
    import torch

    NamedTensors = Iterator[tuple[str, torch.Tensor]]
else:
    NamedTensors = Any

LearnerPart = Literal["optimizer", "gradients", "weights"]
EnginePart = Literal["weights", "kv_cache"]


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def eos_token_id(self) -> int: ...

    def encode(self, text: str) -> Tokens:
        """No special tokens are added."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> Tokens:
        """By the chat template, up to where the assistant begins to speak."""
        ...

    def pieces(self, token_ids: Tokens) -> list[str]:
        """The text that each token adds; '' for a special token or an unfinished character."""
        ...


class Generator(Protocol):
    """The rollout engine."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order in which they finish."""
        ...


class Scorer(Protocol):
    """A rollout engine that judges given sequences."""

    def score(self, sequences: Sequence[Tokens]) -> list[Floats]:
        """Each [T - 1]: log-prob of every token after the first, at temperature 1; nothing is
        generated. All processes of a replica pass the same sequences."""
        ...


class WeightReceiver(Protocol):
    """A rollout engine whose weights can be replaced while it runs."""

    @property
    def weight_version(self) -> int:
        """Number of policy updates that the weights have seen."""
        ...

    def load_weights(self, named_tensors: NamedTensors, *, version: int) -> None:
        """Full Hugging Face tensors, any order; what was cached under older weights is dropped."""
        ...


class Reward(Protocol):
    """Checks a whole response."""

    def __call__(self, prompt: Prompt, response: str) -> Score: ...


class Judge(Protocol):
    """Asks a reward about many responses while others are still being generated."""

    def judge(self, items: Iterable[tuple[Prompt, str]]) -> list[Score]:
        """Scores in the order of the items. Each item is passed on when it comes; answers are
        waited for when the last has come. What the items raise passes."""
        ...


@runtime_checkable
class ResetRule(Protocol):
    """Chooses how far a failed rollout goes back. Built with (Config, Tokenizer)."""

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        """One reset per seed, in their order; whatever is drawn is drawn from the seed's id."""
        ...


@runtime_checkable
class CreditRule(Protocol):
    """Turns rewards into credit per token. Built with (Config)."""

    def assign(self, groups: Sequence[Group]) -> list[list[tuple[Floats, Floats]]]:
        """(loss_weight, advantage), each [T_response], per rollout of each group."""
        ...


class Learner(Protocol):
    """The policy in training. Every call is collective."""

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step per batch; all speak of the policy before the first of them. Metrics
        are equal on all ranks."""
        ...

    def logprobs(self, sequences: Sequence[Tokens], *, temperature: float) -> list[Floats]:
        """Each [T - 1]: log-prob of every token after the first. The ranks that hold one copy of
        the policy pass the same sequences, and all of them get the answer."""
        ...

    def export(self) -> NamedTensors:
        """Full tensors by Hugging Face name, gathered one at a time; a collective call."""
        ...


class Parkable(Protocol):
    """A learner that can lend the memory of its device."""

    def park(self, part: LearnerPart) -> None:
        """Nobody may look at the part from now on. Gradients are forgotten: an update begins
        without any."""
        ...

    def unpark(self, part: LearnerPart) -> None:
        """As it was."""
        ...

    def held(self) -> dict[str, int]:
        """Bytes on the device, by owner."""
        ...


class Sleeper(Protocol):
    """A rollout engine that can lend the memory of its device."""

    def sleep(self) -> None:
        """Weights, keys and values are gone; nothing of them stays in host memory."""
        ...

    def wake(self, part: EnginePart) -> None:
        """There is room for the part again, with nothing in it. Awake are: nothing, the weights,
        all."""
        ...

    def held(self) -> dict[str, int]:
        """Bytes on the device, by owner."""
        ...


class PromptSource(Protocol):
    """Where a step's prompts come from; its position can be stored."""

    def next(self, num_prompts: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Collect(Protocol):
    """prompts -> groups: live from an engine, or replayed from a journal."""

    def __call__(self, prompts: Sequence[Prompt], *, step: int) -> list[Group]: ...

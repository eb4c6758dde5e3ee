"""A deterministic engine without a model: pure logic can be tested and read against it.

It implements `Generator`, `Scorer`, `WeightReceiver`, `Sleeper` and `Tokenizer` over characters:
token = code point.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_srpo.protocols import EnginePart, NamedTensors
from megatron_srpo.types import Completion, Floats, Request, Tokens

EOS = 0
BYTES: dict[EnginePart, int] = {"weights": 5, "kv_cache": 7}


class CharTokenizer:
    """One token per character; token 0 ends a sequence and has no text."""

    eos_token_id = EOS

    def encode(self, text: str) -> Tokens:
        return np.array([ord(character) for character in text], dtype=np.int32)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> Tokens:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def pieces(self, token_ids: Tokens) -> list[str]:
        return ["" if token == EOS else chr(token) for token in token_ids]


class FakeGenerator:
    """Answers a context with `answer(context text, random numbers of the request's seed)`.

    Shorter answers finish first, as in a real engine. Remembers the contexts that it was given.
    """

    def __init__(self, answer: Callable[[str, random.Random], str]) -> None:
        self._answer = answer
        self.weight_version = 0
        self.seen: list[list[Request]] = []
        self.awake: tuple[EnginePart, ...] = tuple(BYTES)
        self.has_weights = True

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        assert self.awake == tuple(BYTES), "a sleeping engine takes requests and never answers"
        assert self.has_weights, "its weights are what was left in the memory that it got"
        self.seen.append(list(requests))
        completions = [self._complete(request) for request in requests]
        yield from sorted(completions, key=lambda completion: len(completion.token_ids))

    def _complete(self, request: Request) -> Completion:
        tokenizer = CharTokenizer()
        context = "".join(tokenizer.pieces(request.context))
        answer = self._answer(context, random.Random(request.seed))
        token_ids = np.append(tokenizer.encode(answer), np.int32(EOS))[: request.max_tokens]
        return Completion(
            request_id=request.id,
            token_ids=token_ids,
            logprobs=-np.arange(1, len(token_ids) + 1, dtype=np.float32),
            finish_reason="stop" if token_ids[-1] == EOS else "length",
            num_cached_tokens=0,
            weight_version=self.weight_version,
        )

    def score(self, sequences: Sequence[Tokens]) -> list[Floats]:
        """-1, -2, ... as if each sequence had been sampled behind its first token."""
        return [-np.arange(1, len(sequence), dtype=np.float32) for sequence in sequences]

    def load_weights(self, named_tensors: NamedTensors, *, version: int) -> None:
        assert "weights" in self.awake, "loading writes to memory that is another's by now"
        for _ in named_tensors:
            pass
        self.weight_version = version
        self.has_weights = True

    def sleep(self) -> None:
        """Nothing of the weights stays."""
        assert self.awake, "it sleeps already"
        self.awake, self.has_weights = (), False

    def wake(self, part: EnginePart) -> None:
        """In the order of `BYTES`, each once: vLLM passes over what is awake, without a word."""
        assert (*self.awake, part) == tuple(BYTES)[: len(self.awake) + 1], f"{part} is not next"
        self.awake = (*self.awake, part)

    def held(self) -> dict[str, int]:
        return {f"engine {part}": size * (part in self.awake) for part, size in BYTES.items()}

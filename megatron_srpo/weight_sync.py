"""Policy weights -> running rollout engine: streamed, complete, versioned, verified.

    learner.export() --(hf name, full tensor)--> generator.load_weights()

On a GPU the engine has slept. It gets room for its weights, then the weights, and only then, when
nothing is gathered any more, room for keys and values (`turns.py`).

After each load both engines are asked for the log-probs of a short probe. The probe continues a
prefix that was cached *before* the load (`cache_probe`), so it shows a weight that did not arrive,
a tied head left behind and a prefix cache that was not reset. Any replica's engine may be the one
that is off, and any copy of the policy: each copy judges every replica's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_srpo.protocols import Generator, Learner, NamedTensors, WeightReceiver
from megatron_srpo.seeding import counter_seed
from megatron_srpo.turns import AllStay, Turns
from megatron_srpo.types import AlarmError, Completion, Floats, Prompt, Request, Tokens

PROBE_TOKENS = 8
"""Sampled by the probe."""


class RolloutEngine(Generator, WeightReceiver, Protocol):
    """What the learner's weights go to."""


@dataclass(slots=True, kw_only=True)
class WeightSync:
    learner: Learner
    engine: RolloutEngine
    shapes: Mapping[str, tuple[int, ...]]
    """Hugging Face name -> shape: what must arrive, each once."""
    probe: Tokens
    """[T] context of the probe, longer than a block of the prefix cache."""
    temperature: float
    max_logprob_diff: float
    gather: Callable[[Any], list[Any]]
    """Every rank's value, on every rank (`Mesh.gather`)."""
    turns: Turns = field(default_factory=AllStay)
    """With the memory of the device."""
    _unjudged: list[tuple[Tokens, Floats]] = field(default_factory=list, init=False)
    """Every rank's answer to the probe."""

    def __call__(self, *, version: int) -> dict[str, float]:
        """Collective; what it measures is equal on all ranks. Raises as `verdict` does, unless the
        learner lends its weights: then that is to be called when it has them again."""
        arrived: set[str] = set()
        self.turns.receive()
        stream = checked(self.learner.export(), self.shapes, arrived)
        self.engine.load_weights(stream, version=version)
        if missing := self.shapes.keys() - arrived:
            raise AlarmError(f"weight sync {version}: {min(missing)} and maybe more did not arrive")
        self.turns.answer()
        answer = self._ask(version, max_tokens=PROBE_TOKENS)
        assert answer.weight_version == version, "the version was not stamped"
        self._unjudged = self.gather((answer.token_ids, answer.logprobs))
        return {} if self.turns.lends_weights else self.verdict()

    def cache_probe(self) -> None:
        """The engine computes the probe's context, and is about to get other weights."""
        self._ask(self.engine.weight_version, max_tokens=1)

    def verdict(self) -> dict[str, float]:
        """Collective: of the last sync's probe, once. Raises `AlarmError` on every rank if any two
        engines differ by more than `max_logprob_diff` nats."""
        answers, self._unjudged = self._unjudged, []
        if not answers:
            return {}
        # Of numpy's max: it keeps a NaN.
        difference = float(np.max(self.gather(self._difference(answers))))
        if not difference <= self.max_logprob_diff:
            raise AlarmError(
                f"after weight sync {self.engine.weight_version} the rollout engine's log-probs "
                f"differ from the trainer's by {difference:.2g} nats "
                f"(max_logprob_diff={self.max_logprob_diff:g})"
            )
        return {"sync/probe_logprob_abs_max": difference}

    def _difference(self, answers: Sequence[tuple[Tokens, Floats]]) -> float:
        """The largest of any answer from what this copy of the policy says of it."""
        asked = [np.concatenate([self.probe, token_ids]) for token_ids, _ in answers]
        distinct = {probe.tobytes(): probe for probe in asked}
        expected = self.learner.logprobs([*distinct.values()], temperature=self.temperature)
        right = dict(zip(distinct, expected, strict=True))
        differences = [
            np.abs(right[probe.tobytes()][-len(logprobs) :] - logprobs).max()
            for probe, (_, logprobs) in zip(asked, answers, strict=True)
        ]
        return float(np.max(differences))

    def _ask(self, version: int, max_tokens: int) -> Completion:
        request = Request(
            id=f"probe/{version}/{max_tokens}",
            purpose="probe",
            context=self.probe,
            max_tokens=max_tokens,
            temperature=self.temperature,
            seed=counter_seed("probe", version),
        )
        (completion,) = self.engine.generate([request])
        return completion


def checked(
    named_tensors: NamedTensors, shapes: Mapping[str, tuple[int, ...]], arrived: set[str]
) -> NamedTensors:
    """The same stream; raises `AlarmError` unless a name is expected, new, and of its shape."""
    for name, tensor in named_tensors:
        expected = shapes.get(name) if name not in arrived else None
        if expected != tuple(tensor.shape):
            raise AlarmError(
                f"weight sync: {name} came with shape {tuple(tensor.shape)}, expected "
                + (f"{expected}" if expected else "no such tensor, or it came before")
            )
        arrived.add(name)
        yield name, tensor


def probe_context(prompt: Prompt, max_model_len: int) -> Tokens:
    """A prompt, repeated until it fills blocks of any prefix cache."""
    length = min(80, max_model_len - PROBE_TOKENS)
    return np.resize(prompt.token_ids, length)

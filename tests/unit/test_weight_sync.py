"""Each way in which weights can fail to arrive raises the alarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.protocols import NamedTensors
from megatron_srpo.types import AlarmError, Batch, Floats, Tokens
from megatron_srpo.weight_sync import PROBE_TOKENS, WeightSync, checked, probe_context
from tests.unit.builders import prompt

SHAPES = {"embed": (4, 2), "norm": (2,), "head": (4, 2)}


class OffLearner:
    """Agrees with `FakeGenerator` on the probe up to `error` nats; exports what it is given."""

    def __init__(self, error: float = 0.0, *tensors: tuple[str, tuple[int, ...]]) -> None:
        self._error = error
        self._tensors = tensors or tuple(SHAPES.items())
        self.asked: list[Tokens] = []

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        raise AssertionError("a sync does not train")

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in self._tensors:
            yield name, torch.zeros(shape)

    def logprobs(self, sequences: Sequence[Tokens], *, temperature: float) -> list[Floats]:
        assert temperature == 0.5, "the engine's"
        self.asked.extend(sequences)
        sampled = -np.arange(1, PROBE_TOKENS + 1, dtype=np.float32)
        sampled[3] += self._error
        context = np.full(len(sequences[0]) - 1 - PROBE_TOKENS, 99, np.float32)
        return [np.concatenate([context, sampled])] * len(sequences)


class WatchedEngine(FakeGenerator):
    """Writes down in which order it is asked and loaded."""

    def __init__(self) -> None:
        super().__init__(lambda context, rng: "abcdefghij")
        self.events: list[str] = []

    def generate(self, requests):  # type: ignore[no-untyped-def]
        self.events.append(f"generate {requests[0].max_tokens}")
        return super().generate(requests)

    def load_weights(self, named_tensors: NamedTensors, *, version: int) -> None:
        super().load_weights(named_tensors, version=version)
        self.events.append(f"load {version}")


def sync(
    learner: OffLearner,
    engine: WatchedEngine,
    bound: float = 1e-3,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> WeightSync:
    return WeightSync(
        learner=learner,
        engine=engine,
        shapes=SHAPES,
        probe=np.arange(65, 85, dtype=np.int32),
        temperature=0.5,
        max_logprob_diff=bound,
        gather=gather,
    )


def test_a_whole_stream_passes_through_unchanged():
    tensors = [(name, torch.ones(shape)) for name, shape in SHAPES.items()]
    arrived: set[str] = set()
    assert [*checked(iter(tensors), SHAPES, arrived)] == tensors
    assert arrived == set(SHAPES)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([("embed", (4, 2)), ("norm", (2,))], "sync 1: head .* did not arrive"),
        ([("embed", (4, 2))], "sync 1: head .* did not arrive"),
        ([("embed", (4, 2)), ("embed", (4, 2))], "embed came with shape .* or it came before"),
        ([("embed", (2, 4))], r"embed came with shape \(2, 4\), expected \(4, 2\)"),
        ([("bias", (2,))], "bias came with shape .* no such tensor"),
    ],
    ids=["missing", "two missing", "doubled", "wrong shape", "unknown"],
)
def test_a_stream_that_is_not_whole_raises_the_alarm(
    tensors: list[tuple[str, tuple[int, ...]]], message: str
):
    with pytest.raises(AlarmError, match=message):
        sync(OffLearner(0.0, *tensors), WatchedEngine())(version=1)


def test_the_probe_reports_the_largest_difference_of_any_sampled_token():
    measured = sync(OffLearner(5e-4), WatchedEngine())(version=1)
    assert measured == {"sync/probe_logprob_abs_max": pytest.approx(5e-4, rel=1e-3)}


@pytest.mark.parametrize("error", [2e-3, -2e-3, float("nan"), float("inf")])
def test_a_probe_that_differs_by_more_than_the_bound_raises_the_alarm(error: float):
    with pytest.raises(AlarmError, match=r"after weight sync 4 .*max_logprob_diff=0.001"):
        sync(OffLearner(error), WatchedEngine())(version=4)


def test_the_probes_prefix_is_cached_before_the_new_weights_arrive():
    engine = WatchedEngine()
    weight_sync = sync(OffLearner(), engine)
    weight_sync.cache_probe()
    weight_sync(version=3)
    assert engine.events == ["generate 1", "load 3", f"generate {PROBE_TOKENS}"]
    before, after = (batch[0] for batch in engine.seen)
    assert before.context.tolist() == after.context.tolist() == [*range(65, 85)]
    assert {before.temperature, after.temperature} == {0.5}
    assert before.id != after.id


def test_the_learner_is_asked_about_the_tokens_that_the_engine_sampled():
    learner = OffLearner()
    sync(learner, WatchedEngine())(version=1)
    (sequence,) = learner.asked
    assert sequence.tolist() == [*range(65, 85), *map(ord, "abcdefgh")]


def test_what_is_generated_after_a_sync_is_stamped_with_its_version():
    engine = WatchedEngine()
    weight_sync = sync(OffLearner(), engine)
    for version in (1, 2):
        weight_sync(version=version)
        (completion,) = engine.generate([engine.seen[0][0]])
        assert completion.weight_version == version


def test_each_version_probes_with_its_own_seed():
    engine = WatchedEngine()
    weight_sync = sync(OffLearner(), engine)
    weight_sync(version=1)
    weight_sync(version=2)
    first, second = (batch[0].seed for batch in engine.seen)
    assert first != second


def test_a_verdict_is_given_once():
    weight_sync = sync(OffLearner(), WatchedEngine())
    assert weight_sync(version=1) and weight_sync.verdict() == {}


def test_the_probes_context_repeats_a_prompt_and_leaves_room_for_what_is_sampled():
    short = prompt("abc")
    assert probe_context(short, 4096).tolist() == [97, 98, 99] * 26 + [97, 98]
    assert len(probe_context(short, 20)) == 20 - PROBE_TOKENS


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_another_replica_s_engine_that_is_off_raises_the_alarm_here_too(error: float):
    def gather(value: Any) -> list[Any]:
        if isinstance(value, float):
            return [value]
        token_ids, logprobs = value
        return [value, (token_ids, logprobs + np.float32(error))]

    learner = OffLearner()
    with pytest.raises(AlarmError, match="after weight sync 2"):
        sync(learner, WatchedEngine(), gather=gather)(version=2)
    assert len(learner.asked) == 1, "equal answers are judged once"


@pytest.mark.parametrize("order", [[0.0, float("nan")], [float("nan"), 0.0], [0.0, 2e-3]])
def test_another_rank_s_trainer_that_is_off_raises_the_alarm_here_too(order: list[float]):
    def gather(value: Any) -> list[Any]:
        return order if isinstance(value, float) else [value]

    with pytest.raises(AlarmError, match="after weight sync 2"):
        sync(OffLearner(), WatchedEngine(), gather=gather)(version=2)

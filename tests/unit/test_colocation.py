"""Who holds the memory in each phase, on stand-ins that count bytes and forgive nothing.

The traps are those of peers' reports: what an engine does with memory that it does not have, and
what a trainer holds while the engine wakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from megatron_srpo.colocation import Colocation
from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.protocols import EnginePart, LearnerPart, NamedTensors
from megatron_srpo.stopping import StopPoints
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.turns import TakeTurns
from megatron_srpo.types import AlarmError, Batch, Floats, Request, Tokens
from megatron_srpo.weight_sync import PROBE_TOKENS, WeightSync

LEARNER: dict[LearnerPart, int] = {"weights": 10, "gradients": 20, "optimizer": 60}
BUCKET = 2
PHASES: tuple[str, ...] = ("syncing", "generating", "training", "saving")


class CountedDevice:
    """Of both engines; remembers the most that they held together, and what happened in which
    order."""

    def __init__(self) -> None:
        self.learner, self.engine = CountedLearner(self), CountedEngine(self)
        self.most, self.events = 0, list[str]()

    def note(self, event: str, extra: int = 0) -> None:
        self.events.append(event)
        held = sum(self.learner.held().values()) + sum(self.engine.held().values())
        self.most = max(self.most, held + extra)


class CountedLearner:
    """A whole learner; what is parked cannot be looked at."""

    def __init__(self, device: CountedDevice) -> None:
        self._device, self.away = device, set[LearnerPart]()
        self.num_updates, self.error = 0, 0.0

    def park(self, part: LearnerPart) -> None:
        assert part not in self.away
        self.away.add(part)
        self._device.note(f"park {part}")

    def unpark(self, part: LearnerPart) -> None:
        self.away.remove(part)
        self._device.note(f"unpark {part}")

    def held(self) -> dict[str, int]:
        return {part: size for part, size in LEARNER.items() if part not in self.away}

    def export(self) -> NamedTensors:
        for name in ("embed", "norm"):
            assert "weights" not in self.away, "what is gathered is not there"
            self._device.note("gather", extra=BUCKET)
            yield name, torch.zeros(2)

    def logprobs(self, sequences: Sequence[Tokens], *, temperature: float) -> list[Floats]:
        assert "weights" not in self.away, "the trainer judges with weights that are not there"
        sampled = -np.arange(1, PROBE_TOKENS + 1, dtype=np.float32) + self.error
        return [np.concatenate([np.zeros(len(s) - 1 - PROBE_TOKENS), sampled]) for s in sequences]

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        assert not self.away, f"{self.away} is parked"
        self._device.note("update")
        self.num_updates += 1
        return {}


class CountedEngine(FakeGenerator):
    """The fake engine; its weights are what was loaded last."""

    def __init__(self, device: CountedDevice) -> None:
        super().__init__(lambda context, rng: "abcdefghij")
        self._device = device

    def sleep(self) -> None:
        super().sleep()
        self._device.note("sleep")

    def wake(self, part: EnginePart) -> None:
        super().wake(part)
        self._device.note(f"wake {part}")

    def load_weights(self, named_tensors: NamedTensors, *, version: int) -> None:
        super().load_weights(named_tensors, version=version)
        self._device.note(f"load {version}")

    def generate(self, requests: Sequence[Request]):  # type: ignore[no-untyped-def]
        self._device.note(f"ask {len(requests)}")
        return super().generate(requests)


def build(*park: LearnerPart) -> tuple[CountedDevice, Colocation, WeightSync]:
    """As `assembly.build_engines` leaves both."""
    device = CountedDevice()
    for part in park:
        device.learner.park(part)
    device.engine.sleep()
    device.most, device.events = 0, []
    gpu = Colocation(Stopwatch(), StopPoints())
    gpu.turns = TakeTurns(
        learner=device.learner, engine=device.engine, park=park, parked=list(park)
    )
    sync = WeightSync(
        learner=device.learner,
        engine=device.engine,
        shapes={"embed": (2,), "norm": (2,)},
        probe=np.arange(65, 85, dtype=np.int32),
        temperature=0.5,
        max_logprob_diff=1e-3,
        gather=lambda value: [value],
        turns=gpu.turns,
    )
    return device, gpu, sync


def one_step(device: CountedDevice, gpu: Colocation, sync: WeightSync, step: int) -> None:
    """The loop's phases."""
    with gpu.syncing():
        measured = sync(version=step)
    with gpu.generating():
        rollouts(device)
        sync.cache_probe()
    with gpu.training():
        measured |= sync.verdict()
        device.learner.update([])
    assert set(measured) == {"sync/probe_logprob_abs_max"}
    with gpu.saving():
        assert not device.learner.away


def rollouts(device: CountedDevice) -> None:
    context = np.array([65], np.int32)
    request = Request(
        id="r", purpose="base", context=context, max_tokens=4, temperature=1.0, seed=0
    )
    (completion,) = device.engine.generate([request])
    assert completion.weight_version == device.learner.num_updates


ORDER = [
    "unpark weights",  # only where they are lent
    "park optimizer",
    "park gradients",
    "wake weights",
    "gather",
    "gather",
    "load 1",
    "park weights",
    "wake kv_cache",
    "ask 1",  # the probe
    "ask 1",  # rollouts
    "ask 1",  # what the next sync's probe finds in the cache
    "sleep",
    "unpark optimizer",
    "unpark gradients",
    "unpark weights",
    "update",
]


@pytest.mark.parametrize(
    "park",
    [("optimizer", "gradients"), ("optimizer", "gradients", "weights"), ("gradients",), ()],
    ids=lambda park: "+".join(park) or "nothing",
)
def test_a_step_s_memory_changes_hands_in_this_order(park: tuple[LearnerPart, ...]):
    device, gpu, sync = build(*park)
    one_step(device, gpu, sync, step=0)
    device.events = []
    one_step(device, gpu, sync, step=1)
    lent = {f"{verb} {part}" for part in park for verb in ("park", "unpark")}
    expected = [e for e in ORDER if not e.startswith(("park", "unpark")) or e in lent]
    if "weights" in park:  # they were there: training had brought them back
        expected.remove("unpark weights")
    assert device.events == expected


def most(*park: LearnerPart) -> int:
    device, gpu, sync = build(*park)
    for step in range(3):
        one_step(device, gpu, sync, step)
    return device.most


def test_keys_and_values_never_share_the_gpu_with_what_is_gathered_or_parked():
    """vLLM RFC 15254, NeMo-RL 191: an engine that wakes whole needs room for old weights, cache
    and the new weights at once."""
    training = sum(LEARNER.values())
    engine = sum(FakeGenerator(lambda c, r: "").held().values())
    assert most("optimizer", "gradients") == training
    assert LEARNER["weights"] + engine < training
    assert most() == training + engine, "nothing is lent: the plan says so, and it must fit"


def test_lent_weights_are_away_before_keys_and_values_come():
    device, gpu, sync = build("optimizer", "gradients", "weights")
    with gpu.syncing():
        sync(version=0)
    engine = sum(device.engine.held().values())
    assert device.most == max(LEARNER["weights"] + 5 + BUCKET, engine)


def test_the_first_phase_is_a_sync_because_the_engine_was_built_without_weights():
    device, gpu, _ = build("optimizer", "gradients")
    wanted = pytest.raises(AssertionError, match="a weight sync comes before generation")
    with wanted, gpu.generating():
        rollouts(device)


def test_weights_do_not_go_to_an_engine_that_sleeps():
    """TRL 5312: the load writes into memory that is another's; CUDA does not complain."""
    device, _, _ = build()
    with pytest.raises(AssertionError, match="another's by now"):
        device.engine.load_weights(device.learner.export(), version=1)


def test_an_engine_that_sleeps_or_has_no_weights_is_not_asked():
    """ms-swift 6962: it waits for ever; vLLM 16564: it answers with what was in the memory."""
    device, _, _ = build()
    with pytest.raises(AssertionError, match="never answers"):
        rollouts(device)
    device.engine.wake("weights")
    with pytest.raises(AssertionError, match="never answers"):
        rollouts(device)
    device.engine.wake("kv_cache")
    with pytest.raises(AssertionError, match="what was left in the memory"):
        rollouts(device)


@pytest.mark.parametrize("woken", [["kv_cache"], ["weights", "weights"]])
def test_an_engine_wakes_its_weights_first_and_each_part_once(woken: list[EnginePart]):
    """vLLM passes over a part that is awake with a warning in its log."""
    device, _, _ = build()
    with pytest.raises(AssertionError, match="is not next"):
        for part in woken:
            device.engine.wake(part)


def test_whoever_saves_finds_all_of_the_trainer_s_state_also_after_generation():
    """A run that is asked to stop while it generates: a parked optimizer would be saved empty."""
    device, gpu, sync = build("optimizer", "gradients", "weights")
    with gpu.syncing():
        sync(version=0)
    with gpu.generating():
        rollouts(device)
    with gpu.saving():
        assert not device.learner.away and not device.engine.awake


def test_two_syncs_in_a_row_begin_with_an_engine_that_sleeps():
    device, gpu, sync = build("optimizer")
    for version in range(2):
        with gpu.syncing():
            sync(version=version)
    assert device.events.count("sleep") == 1


def test_a_trainer_without_weights_judges_the_sync_before_it_trains():
    device, gpu, sync = build("optimizer", "gradients", "weights")
    device.learner.error = 1.0
    with gpu.syncing():
        assert sync(version=0) == {}
    with gpu.generating():
        rollouts(device)
    with pytest.raises(AlarmError, match="after weight sync 0"), gpu.training():
        sync.verdict()
        device.learner.update([])
    assert device.learner.num_updates == 0


def test_a_phase_inside_a_phase_is_refused():
    _, gpu, sync = build("optimizer", "gradients")
    with gpu.syncing():
        sync(version=0)
        wanted = pytest.raises(AssertionError, match="'train' begins inside phase 'sync'")
        with wanted, gpu.training():
            pass


def phases(gpu: Colocation) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
    names = {"start": gpu.building, "sync": gpu.syncing, "generate": gpu.generating}
    yield from (names | {"train": gpu.training, "checkpoint": gpu.saving}).items()


@pytest.mark.parametrize("name", ["start", "sync", "generate", "train", "checkpoint"])
def test_exhausted_memory_is_an_alarm_that_names_phase_holders_plan_and_a_way_out(name: str):
    _device, gpu, sync = build("optimizer", "gradients")
    if name == "generate":
        with gpu.syncing():
            sync(version=0)
    gpu.planned_gib = {name: 81.25}
    with pytest.raises(AlarmError) as caught, dict(phases(gpu))[name]():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
            "139 GiB. If reserved but unallocated memory is large try ..."
        )
    told = str(caught.value)
    assert told.startswith(
        f"out of memory in phase '{name}': CUDA out of memory. Tried to allocate 2.00 GiB; "
    )
    assert "planned for this phase: 81.2 GiB" in told and "to need less: " in told
    assert "advice" not in told and "try ..." not in told
    assert "\n" not in told
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    holders = told.split("held: ")[1].split(";")[0]
    assert "weights 0.0 GiB" in holders
    assert ("optimizer" in holders) == (name in ("train", "checkpoint"))
    assert ("engine kv_cache" in holders) == (name == "generate")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_libraries_miss_is_told_alike_and_no_other_error_is(said: str):
    """NCCL makes a group's buffers when it is first used, cuBLAS its workspace; exit code 1 would
    start the run again, and again."""
    gpu = Colocation(Stopwatch(), StopPoints())
    with pytest.raises(AlarmError, match=r"out of memory in phase 'sync': "), gpu.syncing():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match=r"^illegal"), gpu.syncing():
        raise RuntimeError("illegal memory access")
    with pytest.raises(AlarmError, match=r"^the reward"), gpu.syncing():
        raise AlarmError("the reward of p17 failed: out of memory")


def test_memory_that_is_exhausted_while_it_changes_hands_is_told_alike():
    device, gpu, sync = build("optimizer", "gradients")

    def no_room(part: LearnerPart) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And so on")

    device.learner.unpark = no_room  # type: ignore[method-assign]
    wanted = pytest.raises(AlarmError, match=r"in phase 'train'.*Tried to allocate 9 GiB;")
    with wanted, gpu.training():
        pass
    assert sync.verdict() == {}

"""Does it fit, what would, which layout is the fastest?   setup -> `Plan`, or one line why not"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_srpo.plan.compute import StepTime, plan_step, run_hours
from megatron_srpo.plan.memory import GIB, PhaseMemory, plan_memory
from megatron_srpo.plan.setup import Setup
from megatron_srpo.protocols import LearnerPart
from megatron_srpo.types import InputError

SIZES = (1, 2, 4, 8)
STAGES = (1, 2, 4, 8, 16)
EQUAL = 0.03
"""Estimates that differ by less are not told apart."""
MOST_GPUS = 1024
"""That anybody is told to take."""
LENT: tuple[LearnerPart, ...] = ("gradients", "optimizer", "weights")
"""Of the trainer, what the engine's turn can do without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run takes."""

    setup: Setup
    memory: tuple[PhaseMemory, ...]
    step: StepTime

    @property
    def fullest(self) -> PhaseMemory:
        """The phase that needs most of a GPU."""
        return max(self.memory, key=lambda each: each.total)

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return run_hours(self.setup, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting, otherwise."""

    word: str
    """As on the command line."""
    setup: Setup


def plan(setup: Setup) -> Plan:
    """Raises `InputError` for what does not divide, or fit into a GPU, with the smallest change of
    one setting that does."""
    try:
        setup.check()
    except InputError as error:
        raise InputError(f"{error}; {_advice(setup)}") from error
    memory = plan_memory(setup)
    if wanting := _wanting(setup, memory):
        raise InputError(wanting)
    return Plan(setup=setup, memory=memory, step=plan_step(setup))


def _wanting(setup: Setup, memory: Sequence[PhaseMemory]) -> str:
    """One line on the fullest phase, if it does not fit."""
    fullest = max(memory, key=lambda each: each.total)
    if fullest.total <= setup.gpu.memory_bytes:
        return ""
    return (
        f"phase {fullest.phase} does not fit: {fullest.total / GIB:.1f} GiB are planned on a "
        f"GPU of stage {fullest.stage}, an {setup.gpu.name} has "
        f"{setup.gpu.memory_bytes / GIB:.1f}; {_advice(setup)}"
    )


def verdict(setup: Setup) -> str:
    """One line for whoever is about to run it: the largest phase against what a GPU has."""
    memory = plan_memory(setup)
    if wanting := _wanting(setup, memory):
        return f"plan: WARNING: {wanting}; it is tried all the same, since a plan is an estimate"
    fullest = max(memory, key=lambda each: each.total)
    return (
        f"plan: fits: at the most {fullest.total / GIB:.1f} GiB, in phase {fullest.phase}, of the "
        f"{setup.gpu.memory_bytes / GIB:.1f} of an {setup.gpu.name}"
    )


def check_state(setup: Setup) -> None:
    """Raises `InputError` if a GPU cannot hold weights, gradients and the optimizer's state alone,
    which are counted as Megatron makes them and not estimated."""
    most = max(plan_memory(setup), key=lambda each: each.state)
    if most.state > setup.gpu.memory_bytes:
        raise InputError(
            f"weights, gradients and optimizer alone take {most.state / GIB:.1f} GiB on a GPU of "
            f"stage {most.stage}, an {setup.gpu.name} has {setup.gpu.memory_bytes / GIB:.1f}; "
            f"{_advice(setup)}"
        )


def fits(setup: Setup) -> bool:
    """Divides, and finds room in every phase."""
    try:
        setup.check()
    except InputError:
        return False
    return all(each.total <= setup.gpu.memory_bytes for each in plan_memory(setup))


def _advice(setup: Setup) -> str:
    change = smallest_change(setup)
    if change is None:
        return f"no change of one setting fits; --search {setup.num_gpus} looks for several at once"
    return f"{change.word} fits"


def smallest_change(setup: Setup) -> Change | None:
    """Of each setting the first value that fits; of those the one with the fastest step. More GPUs
    only if nothing else does."""
    first = [next((c for c in changes if fits(c.setup)), None) for changes in _changes(setup)]
    found = [change for change in first if change is not None]
    if found:
        return min(found, key=lambda change: plan_step(change.setup).step_s)
    more = (setup.num_gpus * times for times in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64))
    grown = (Change(word=f"--gpus {n}", setup=replace(setup, num_gpus=n)) for n in more)
    return next((c for c in grown if c.setup.num_gpus <= MOST_GPUS and fits(c.setup)), None)


def _changes(setup: Setup) -> Iterator[Iterator[Change]]:
    """Setting by setting, the smallest change first."""
    cfg = setup.cfg
    yield (changed(setup, tokens) for tokens in _fewer_tokens(setup))
    if cfg.parallel.recompute != "full":
        yield iter([changed(setup, {"parallel.recompute": "full"})])
    if not cfg.parallel.overlap:
        yield iter([changed(setup, {"parallel.overlap": True})])
    yield (changed(setup, {"colocation.park": parts}) for parts in _more_lent(cfg.colocation.park))
    if cfg.dtype == "bfloat16" and not cfg.fp8.param_gather:
        shares = (0.25, 0.5, 0.75, 1.0)
        larger = (share for share in shares if share > cfg.optimizer.offload_fraction)
        yield (changed(setup, {"optimizer.offload_fraction": share}) for share in larger)
    yield (
        changed(setup, {"rollout.kv_cache_bytes": gib * GIB})
        for gib in range((cfg.rollout.kv_cache_bytes - 1) // GIB, 0, -1)
    )
    for knob, size in (
        ("parallel.tp", cfg.parallel.tp),
        ("parallel.pp", cfg.parallel.pp),
        ("parallel.cp", cfg.parallel.cp),
        ("rollout.tp", cfg.rollout.tp),
    ):
        others = sorted({*STAGES} - {size}, key=lambda other, size=size: (other < size, other))
        yield (changed(setup, {knob: other}) for other in others)
    if setup.shape.num_experts:
        yield (changed(setup, {"parallel.ep": n}) for n in STAGES if n > cfg.parallel.ep)


def _more_lent(park: tuple[LearnerPart, ...]) -> Iterator[tuple[LearnerPart, ...]]:
    """What is cheap to lend comes first."""
    for part in LENT:
        if part not in park:
            park = (*park, part)
            yield park


def _fewer_tokens(setup: Setup) -> Iterator[dict[str, object]]:
    tokens = setup.cfg.micro_batch_tokens
    while tokens > setup.longest:
        tokens = max(tokens // 2, setup.longest)
        yield {"micro_batch_tokens": tokens}


def changed(setup: Setup, values: dict[str, object]) -> Change:
    """The same with other values of some fields of the config."""
    cfg = setup.cfg
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        if section:
            value = getattr(cfg, section).model_copy(update={field: value})
        cfg = cfg.model_copy(update={section or field: value})
    words = (f"{name}={_word(value)}" for name, value in values.items())
    return Change(word=" ".join(words), setup=replace(setup, cfg=cfg))


def _word(value: object) -> str:
    """As YAML has it."""
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    return "true" if value is True else str(value)


def search(setup: Setup) -> list[Plan]:
    """Layouts that divide and fit, the fastest first; all other settings are the config's. Raises
    `InputError` if there is none."""
    plans = [
        Plan(setup=each, memory=plan_memory(each), step=plan_step(each))
        for each in _layouts(setup)
        if fits(each)
    ]
    if not plans:
        raise InputError(
            f"no layout of {setup.num_gpus} GPUs ({setup.gpu.name}) divides and fits, with "
            f"micro_batch_tokens={setup.cfg.micro_batch_tokens} and rollout.kv_cache_bytes="
            f"{setup.cfg.rollout.kv_cache_bytes}: give fewer of these, or more GPUs"
        )
    fastest = min(each.step.step_s for each in plans)
    return sorted(plans, key=lambda each: _rank(each, fastest))


def _rank(plan: Plan, fastest: float) -> tuple[int, int, float]:
    """Where the estimate says nothing, the simpler layout comes first."""
    parallel = plan.setup.cfg.parallel
    cuts = parallel.tp * parallel.pp * parallel.vpp * parallel.cp * parallel.ep
    return int((plan.step.step_s / fastest - 1) / EQUAL), cuts, plan.step.step_s


def _layouts(setup: Setup) -> Iterator[Setup]:
    num, per_node = setup.num_gpus, setup.gpu.per_node
    shared = STAGES if setup.shape.num_experts else (1,)
    for tp, pp, cp, ep, rollout_tp in product(SIZES, STAGES, SIZES, shared, SIZES):
        if num % (tp * pp * cp) or tp * cp > per_node or num % rollout_tp:
            continue
        for vpp, recompute in product((1, 2, 4) if pp > 1 else (1,), ("none", "full")):
            values = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "vpp": vpp, "recompute": recompute}
            layout = {f"parallel.{name}": value for name, value in values.items()}
            yield changed(setup, {**layout, "rollout.tp": rollout_tp}).setup

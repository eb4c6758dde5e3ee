"""A plan for people and for programs.   `Plan` -> lines in a terminal, JSON"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_srpo.plan import hardware, tokens
from megatron_srpo.plan.memory import GIB, PARTS
from megatron_srpo.plan.search import Plan

SHOWN = 10
"""Layouts of a search."""
Row = Sequence[str]


def page(plan: Plan) -> Iterator[str]:
    """Layout, memory, time, summary, assumptions."""
    yield from _layout(plan)
    yield ""
    yield from _aligned(_memory_rows(plan))
    yield ""
    yield from _time_rows(plan)
    yield ""
    yield from summary(plan)
    yield ""
    yield "assumed, none of it measured:"
    yield from (f"  {line}" for line in assumptions(plan))


def summary(plan: Plan) -> Iterator[str]:
    """What an example's header says: memory by phase, time."""
    memory = ", ".join(f"{each.phase} {each.total / GIB:.0f}" for each in plan.memory)
    host = max(each.host for each in plan.memory)
    step, cfg = plan.step, plan.setup.cfg
    yield (
        f"memory     GiB of {plan.setup.gpu.memory_bytes / GIB:.0f} on a GPU: {memory}; "
        f"{host / GIB:.0f} on the host for each"
    )
    yield (
        f"hours      {plan.hours:.1f} to {hardware.PUBLISHED * plan.hours:.1f}: {cfg.num_steps} "
        f"steps of {step.step_s:.0f} s "
        f"({step.generate_s:.0f} generate, {step.train.seconds:.0f} train, "
        f"{step.sync.seconds:.1f} sync, {step.park_s:.1f} park), evaluations of "
        f"{step.evaluate_s:.0f} s"
    )


def search_page(plans: Sequence[Plan]) -> Iterator[str]:
    """The fastest layouts, as words for a command line."""
    yield f"{len(plans)} layouts of {plans[0].setup.num_gpus} GPUs fit; the fastest:"
    rows: list[Row] = [("step s", "train s", "generate s", "bubble", "fullest", "left GiB")]
    for plan in plans[:SHOWN]:
        left = plan.setup.gpu.memory_bytes - plan.fullest.total
        rows.append(
            (
                f"{plan.step.step_s:.1f}",
                f"{plan.step.train.seconds:.1f}",
                f"{plan.step.generate_s:.1f}",
                f"{plan.step.train.bubble:.0%}",
                plan.fullest.phase,
                f"{left / GIB:.1f}",
            )
        )
    words = ["", *(overrides(plan) for plan in plans[:SHOWN])]
    for line, word in zip(_aligned(rows), words, strict=True):
        yield f"{line}  {word}".rstrip()


def overrides(plan: Plan) -> str:
    """A layout; what is 1 is left out."""
    parallel, rollout = plan.setup.cfg.parallel, plan.setup.cfg.rollout
    sizes = {
        f"parallel.{name}": getattr(parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep")
    }
    words = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if parallel.recompute != "none":
        words.append(f"parallel.recompute={parallel.recompute}")
    return " ".join([*words, f"rollout.tp={rollout.tp}"])


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds, FLOPs."""
    setup, step = plan.setup, plan.step
    layout = setup.cfg.parallel.model_dump(include={"tp", "pp", "vpp", "cp", "ep", "recompute"})
    return {
        "gpus": setup.num_gpus,
        "gpu": setup.gpu.name,
        "available_bytes": setup.gpu.memory_bytes,
        "layout": layout | {"dp": setup.dp, "rollout_tp": setup.cfg.rollout.tp},
        "memory": [dataclasses.asdict(each) | {"total": each.total} for each in plan.memory],
        "step": dataclasses.asdict(step) | {"generate_s": step.generate_s, "step_s": step.step_s},
        "hours": plan.hours,
        "assumed": [*assumptions(plan)],
    }


def assumptions(plan: Plan) -> Iterator[str]:
    """All that neither the config nor config.json says."""
    gpu = plan.setup.gpu
    yield (
        f"prompts and answers have {tokens.MEAN_LENGTH:.0%} of their longest length, resets keep "
        f"{1 - tokens.SUFFIX_SHARE:.0%} of a response (resets=prompt: nothing)"
    )
    yield (
        "pass rates are spread evenly from 0 to 1, from prompts and from states that are reset to; "
        "all rollouts are trained (a run leaves out groups whose rewards agree)"
    )
    yield (
        f"peaks: {gpu.bf16_flops / 1e12:.0f} TFLOP/s in bf16, {gpu.fp8_flops / 1e12:.0f} in FP8; "
        f"GB/s: {gpu.memory_rate / 1e9:.0f} memory, {gpu.link_rate / 1e9:.0f} to GPUs of the node, "
        f"{gpu.network_rate / 1e9:.0f} to other nodes, {gpu.host_rate / 1e9:.0f} to the host"
    )
    yield (
        f"reached of them: training {hardware.TRAIN_SHARE:.0%} (FP8: {hardware.FP8_SHARE:.0%}), "
        f"reading prompts {hardware.PREFILL_SHARE:.0%}, decoding {hardware.DECODE_SHARE:.0%} of "
        f"the memory's rate and {hardware.ENGINE_STEP_S * 1e3:.0f} ms a token, large messages "
        f"{hardware.LINK_SHARE:.0%}, weight sync {hardware.SYNC_SHARE:.0%}"
    )
    yield (
        f"{hardware.OVERHEAD_BYTES / GIB:.0f} GiB of each GPU are in nobody's tensors; "
        f"micro-batches have {plan.setup.micro_batch_tokens} tokens, all with a loss; "
        "attention keeps no scores (so recompute=attention saves nothing)"
    )
    yield (
        f"lent while the engine is awake: {_lent(plan)}; the engine sleeps at level 2 in training"
    )
    yield "not counted: rewards, checkpoints, waiting for other engines, the start"
    yield (
        f"hours: of a run that reaches all this, to {hardware.PUBLISHED} times as many, which is "
        "what a published run of another system took"
    )


def _lent(plan: Plan) -> str:
    """What travels to the host; gradients are dropped."""
    park = plan.setup.cfg.colocation.park
    return " and ".join(part for part in park if part != "gradients") or "nothing"


def _layout(plan: Plan) -> Iterator[str]:
    setup, layout = plan.setup, plan.setup.cfg.parallel
    tp, cp, dp, pp = layout.tp, layout.cp, setup.dp, layout.pp
    prompts = setup.cfg.algorithm.num_prompts // setup.num_engines
    yield f"{setup.num_gpus} x {setup.gpu.name}, {setup.gpu.per_node} in a node"
    yield (
        f"policy: tp {tp} x cp {cp} x dp {dp} x pp {pp} (vpp {layout.vpp}), ep {layout.ep}; "
        f"rank = tp + {tp} (cp + {cp} (dp + {dp} pp))"
    )
    yield (
        f"rollouts: {setup.num_engines} engines of {setup.cfg.rollout.tp} consecutive ranks, "
        f"{prompts} prompts a step each"
    )


def _memory_rows(plan: Plan) -> Iterator[Row]:
    """GiB."""
    memory, available = plan.memory, plan.setup.gpu.memory_bytes
    yield ("GiB on a GPU", *(each.phase for each in memory))
    yield ("stage that needs most", *(str(each.stage) for each in memory))
    for name in PARTS:
        sizes = [getattr(each, name) for each in memory]
        if any(sizes):
            yield (name.replace("_", " "), *(f"{s / GIB:.1f}" if s else "-" for s in sizes))
    yield ("total", *(f"{each.total / GIB:.1f}" for each in memory))
    yield ("left", *(f"{(available - each.total) / GIB:.1f}" for each in memory))
    yield ("host memory of its process", *(f"{each.host / GIB:.1f}" for each in memory))


def _time_rows(plan: Plan) -> Iterator[str]:
    step, train = plan.step, plan.step.train
    rows: list[Row] = [("a step", "seconds")]
    notes = [""]
    for name in dict.fromkeys(stage.name for stage in step.tokens.stages):
        timed = zip(step.tokens.stages, step.stages_s, strict=True)
        own = [(stage, seconds) for stage, seconds in timed if stage.name == name]
        rows.append((name, f"{sum(seconds for _, seconds in own):.1f}"))
        num, generated = (
            sum(getattr(stage, part) for stage, _ in own) for part in ("num", "num_generated")
        )
        rounds = f" in {len(own)} rounds" if len(own) > 1 else ""
        notes.append(f"{num:.0f} requests{rounds}, {generated:,.0f} tokens")
    rows.append(("park", f"{step.park_s:.1f}"))
    notes.append(f"{_lent(plan)}, both ways")
    rows.append(("train", f"{train.seconds:.1f}"))
    notes.append(
        f"{step.tokens.trained:,.0f} tokens, {train.flops:.2g} FLOPs, MFU {train.mfu:.0%}, "
        f"{train.num_micro_batches} micro-batches, bubble {train.bubble:.0%}"
    )
    rows.append(("sync", f"{step.sync.seconds:.1f}"))
    notes.append(f"{step.sync.bytes / 1e9:.1f} GB to each GPU, floor {step.sync.floor_s:.2f} s")
    rows.append(("all", f"{step.step_s:.1f}"))
    notes.append(
        f"{step.tokens.generated:,.0f} generated tokens, {step.generate_flops:.2g} FLOPs for them"
    )
    for line, note in zip(_aligned(rows), notes, strict=True):
        yield f"{line}  {note}".rstrip()


def _aligned(rows: Iterable[Row]) -> Iterator[str]:
    """The first column to the left, all others to the right."""
    table = [*rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for first, *others in table:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *numbers])

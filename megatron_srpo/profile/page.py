"""One page of a profile.   time by phase and family, tokens -> Markdown"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_srpo.hf_folder import EMBEDDING
from megatron_srpo.plan.hardware import known
from megatron_srpo.profile.kernels import FAMILIES, IDLE, OTHER, PhaseTime

GENERATING = ("generate", "localize", "suffix", "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the profiled steps did, over all GPUs."""

    generated: float
    """Tokens."""
    trained: float
    """Tokens with a loss."""
    active_weights: int
    """Of a token's matrix products."""
    num_gpus: int
    device: str


def active_weights(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int:
    """Matrices, the head's among them, and of experts those that a token meets. `shapes`: all of
    the model's tensors, a tied head too."""
    experts, chosen = config.get("num_experts") or 1, config.get("num_experts_per_tok") or 1
    total = 0
    for name, shape in shapes.items():
        if len(shape) == 2 and name != EMBEDDING:
            size = prod(shape)
            total += size * chosen // experts if ".experts." in name else size
    return total


def page(times: Mapping[str, PhaseTime], work: Work, *, title: str) -> str:
    """Markdown. Seconds of this process's device; shares are of the phase."""
    families = [*FAMILIES, OTHER]
    wall = sum(time.wall for time in times.values())
    idle = sum(time.idle for time in times.values())
    header = ["phase", "seconds", *families, IDLE]
    lines = [f"# {title}", "", f"{work.device}, {work.num_gpus} in all.", ""]
    lines += [_row(header), _row(["---"] * len(header))]
    for name, time in sorted(times.items(), key=lambda item: -item[1].wall):
        lines.append(_row([name, f"{time.wall:.3f}", *_shares(time, families)]))
    whole = PhaseTime(wall=wall, by_family=_sums(times), idle=idle)
    lines.append(_row(["**all**", f"{wall:.3f}", *_shares(whole, families)]))
    trained_s = sum(t.wall for n, t in times.items() if n == "train")
    generated_s = sum(t.wall for n, t in times.items() if n in GENERATING)
    training, generation = (
        factor * work.active_weights * tokens
        for factor, tokens in ((6, work.trained), (2, work.generated))
    )
    lines += [
        "",
        f"- idle: {_share(idle, wall)} of the time no kernel of the phase ran on the device",
        f"- trained: {work.trained:.0f} tokens, {training:.3g} FLOPs, "
        f"MFU {_mfu(training, trained_s, work)}",
        f"- generated: {work.generated:.0f} tokens, {generation:.3g} FLOPs, "
        f"MFU {_mfu(generation, generated_s, work)}",
        f"- both, over all phases: MFU {_mfu(training + generation, wall, work)}",
        "",
        "FLOPs: 6 and 2 for each weight of a matrix product that a token meets. Not counted: "
        "attention scores, prompts and copied prefixes, what is computed again. Streams that work "
        "at once count each.",
    ]
    return "\n".join(lines) + "\n"


def _sums(times: Mapping[str, PhaseTime]) -> dict[str, float]:
    names = {family for time in times.values() for family in time.by_family}
    return {n: sum(time.by_family.get(n, 0.0) for time in times.values()) for n in names}


def _shares(time: PhaseTime, families: list[str]) -> list[str]:
    parts = [time.by_family.get(family, 0.0) for family in families]
    return [_share(part, time.wall) for part in [*parts, time.idle]]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _mfu(flops: float, seconds: float, work: Work) -> str:
    """Of all GPUs' peak, as far as the device is known."""
    gpu = known(work.device)
    if gpu is None or not seconds:
        return "n/a (no known peak)"
    return f"{100 * flops / (seconds * work.num_gpus * gpu.bf16_flops):.1f} %"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""How full are micro-batches, and how equal is the work of ranks?   lengths -> table

    python tools/bench_packing.py [--sequences 4096 256] [--max-tokens 16384] [--draws 5]

Made-up sequence lengths, planned by `batching.plan_micro_batches` and, beside it, by what was here
before: longest to the lightest slot, then first fit within a slot. Cells are "before / now", means
over draws.

fill      % real tokens of what all micro-batches of all slots could hold
padding   % of all tokens that are computed
empty     micro-batches that are padding alone
tokens    heaviest slot by the mean slot, tokens that are computed
squares   the same of the sum of squared lengths: the part of attention that grows with length
rounds    what is waited for where slots meet in every micro-batch (experts are shared): the sum
          over rounds of the heaviest micro-batch, by the mean slot
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from megatron_srpo.batching import Plan, plan_micro_batches
from megatron_srpo.pack_layout import PackLayout

COLUMNS = ("micro-batches", "fill", "padding", "empty", "tokens", "squares", "rounds", "ms")
SLOTS = (8, 16, 64)
LAYOUTS: dict[str, dict[str, int]] = {
    "CP1": {},
    "TP4 CP2 FP8": {"tp": 4, "cp": 2, "fp8_multiple": 16},
    "PP4 VPP2": {"pp": 4, "vpp": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Packing balance.")
    parser.add_argument("--sequences", type=int, nargs="+", default=[4096, 256])
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    print("| lengths | sequences | layout | slots |", " | ".join(COLUMNS), "|")
    print("|---" * (4 + len(COLUMNS)) + "|")
    rows_of = [
        (kind, num, name, num_slots)
        for kind in DISTRIBUTIONS
        for num in arguments.sequences
        for name in LAYOUTS
        for num_slots in SLOTS
    ]
    for kind, num, name, num_slots in rows_of:
        layout = PackLayout.of(
            num_slots=num_slots, max_tokens=arguments.max_tokens, **LAYOUTS[name]
        )
        draws = [DISTRIBUTIONS[kind](num, seed) for seed in range(arguments.draws)]
        old, new = (
            [statistics.mean(column) for column in zip(*rows, strict=True)]
            for rows in ([measured(d, layout, plan) for d in draws] for plan in PLANNERS)
        )
        cells = [
            f"{shown(column, one)} / {shown(column, other)}"
            for column, one, other in zip(COLUMNS, old, new, strict=True)
        ]
        print(f"| {kind} | {num} | {name} | {num_slots} |", " | ".join(cells), "|")


def shown(column: str, mean: float) -> str:
    if column in ("fill", "padding"):
        return f"{100 * mean:.1f}"
    return f"{mean:.1f}" if column in ("micro-batches", "empty", "ms") else f"{mean:.3f}"


def log_normal(num: int, seed: int) -> list[int]:
    """Median 2,000 tokens, cut at 8,192: responses of a reasoning model."""
    drawn = np.random.default_rng(seed).lognormal(np.log(2000), 0.8, num)
    return drawn.astype(int).clip(1, 8192).tolist()


def two_kinds(num: int, seed: int) -> list[int]:
    """Nine short answers to each response that is cut at 8,192."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < 0.1, 8192, rng.integers(100, 1000, num)).tolist()


DISTRIBUTIONS: dict[str, Callable[[int, int], list[int]]] = {
    "log-normal": log_normal,
    "short and cut": two_kinds,
}


def before(lengths: Sequence[int], layout: PackLayout) -> Plan:
    """The plan as it was, with padded lengths, and empty micro-batches up to a legal count."""
    sizes = [layout.padded(length) for length in lengths]
    slots: list[list[int]] = [[] for _ in range(layout.num_slots)]
    loads = [0] * layout.num_slots
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = loads.index(min(loads))
        slots[lightest].append(index)
        loads[lightest] += sizes[index]
    plan = [first_fit(indices, sizes, layout.capacity) for indices in slots]
    count = max(len(micro_batches) for micro_batches in plan)
    count += -count % layout.count_multiple
    for micro_batches in plan:
        while len(micro_batches) < count:
            fullest = max(micro_batches, key=len)
            half = len(fullest) // 2
            micro_batches.append(fullest[:half])
            del fullest[:half]
    return plan


def first_fit(indices: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    rooms: list[int] = []
    for index in indices:
        fits = (number for number, room in enumerate(rooms) if sizes[index] <= room)
        number = next(fits, len(rooms))
        if number == len(rooms):
            micro_batches.append([])
            rooms.append(capacity)
        micro_batches[number].append(index)
        rooms[number] -= sizes[index]
    return micro_batches


PLANNERS = (before, plan_micro_batches)


def measured(
    lengths: list[int], layout: PackLayout, plan_with: Callable[[list[int], PackLayout], Plan]
) -> tuple[float, ...]:
    """In the order of `COLUMNS`."""
    began = time.perf_counter()
    plan = plan_with(lengths, layout)
    milliseconds = 1e3 * (time.perf_counter() - began)

    def computed(micro_batch: Sequence[int]) -> int:
        size = sum(layout.padded(lengths[index]) for index in micro_batch) or 1
        return size + -size % layout.total_multiple

    tokens = np.array([[computed(micro_batch) for micro_batch in slot] for slot in plan])
    squares = np.array([sum(lengths[i] ** 2 for bin in slot for i in bin) for slot in plan])
    of_slots = tokens.sum(1)
    return (
        tokens.shape[1],
        sum(lengths) / (tokens.size * layout.max_tokens),
        1 - sum(lengths) / tokens.sum(),
        sum(not micro_batch for slot in plan for micro_batch in slot),
        of_slots.max() / of_slots.mean(),
        squares.max() / squares.mean(),
        tokens.max(0).sum() / of_slots.mean(),
        milliseconds,
    )


if __name__ == "__main__":
    main()

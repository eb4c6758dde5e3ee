"""Which sequence is computed where?   samples -> packed micro-batches, balanced over ranks

Pure: every rank computes the same plan from all lengths, then sends its samples where the plan
wants them. Invariants (tested), with lengths as padded by `PackLayout`:

- every sequence is in exactly one micro-batch
- a micro-batch holds at most `layout.capacity` tokens unless it is one longer sequence
- all slots have equally many micro-batches, a legal number
- no micro-batch is empty while another holds two sequences, and of empty ones no slot has two more
  than another: where experts are shared, slots wait for each other in every layer of every
  micro-batch
- two micro-batches differ by at most one sequence, and so do two slots

A load is a number of tokens. What attention adds grows with a sequence's square; weighing it
against tokens would need the model's sizes, so it decides only where tokens leave a choice.
benchmarks/packing.md has the balance of both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from heapq import heapreplace
from math import ceil

import numpy as np

from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.types import MicroBatch, Sample

Plan = list[list[list[int]]]
"""[slot][micro-batch][...] index of a sample"""


def plan_micro_batches(lengths: Sequence[int], layout: PackLayout) -> Plan:
    """As few micro-batches as fit, all about equally heavy; the heaviest of all slots come first.

    >>> plan_micro_batches([5, 3, 3, 2], PackLayout.of(num_slots=2, max_tokens=8))
    [[[0, 3]], [[1, 2]]]
    """
    sizes = [layout.padded(length) for length in lengths]
    longest_first = sorted(range(len(sizes)), key=lambda i: (-lengths[i], i))
    counts = _legal_counts(sizes, layout)

    def spread(count: int) -> list[list[int]] | None:
        return _spread(longest_first, sizes, count, layout.capacity)

    fewest = bisect_left(counts, True, key=lambda count: spread(count) is not None)
    micro_batches = spread(counts[fewest])
    assert micro_batches is not None, "the largest count always fits"
    return _deal(micro_batches, sizes, layout.num_slots)


def _legal_counts(sizes: Sequence[int], layout: PackLayout) -> range:
    """Numbers of micro-batches, over all slots, of which the last always suffices.

    Twice what the tokens need is enough: a sequence that fills more than half of a micro-batch then
    finds an empty one, and where a shorter one finds no room, all are more than half full.
    """
    step = layout.num_slots * layout.count_multiple
    need = sum(min(size, layout.capacity) for size in sizes) / layout.capacity
    fewest, enough = (ceil(times * need / step) for times in (1, 2))
    return range(fewest * step, enough * step + 1, step)


def _spread(
    longest_first: Sequence[int], sizes: Sequence[int], count: int, capacity: int
) -> list[list[int]] | None:
    """Each sequence into the lightest of `count` micro-batches; None if there is no room in it."""
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for index in longest_first:
        load, number = loads[0]
        if load and load + sizes[index] > capacity:
            return None
        micro_batches[number].append(index)
        heapreplace(loads, (load + sizes[index], number))
    return micro_batches


def _deal(micro_batches: Sequence[list[int]], sizes: Sequence[int], num_slots: int) -> Plan:
    """In rounds of one for each slot, heaviest round first: what is computed at a time is about
    equally heavy, and however each round is dealt, two slots differ by no more than the heaviest
    and the lightest micro-batch do. So attention decides: most squares to the slot with fewest."""
    heaviest_first = sorted(micro_batches, key=lambda m: -sum(sizes[i] for i in m))
    squares = [sum(sizes[i] ** 2 for i in m) for m in heaviest_first]
    plan: Plan = [[] for _ in range(num_slots)]
    dealt = [0] * num_slots
    for first in range(0, len(heaviest_first), num_slots):
        in_round = range(first, first + num_slots)
        most_first = sorted(in_round, key=lambda number: -squares[number])
        fewest_first = sorted(range(num_slots), key=dealt.__getitem__)
        for slot, number in zip(fewest_first, most_first, strict=True):
            plan[slot].append(heaviest_first[number])
            dealt[slot] += squares[number]
    return plan


def pack(samples: Sequence[Sample], layout: PackLayout) -> MicroBatch:
    """Lay sequences end to end; entry t holds what token t predicts, so a sequence loses one.

    Tokens [a b c] [d e] become inputs a b d, targets b c e, positions 0 1 0, cu_seqlens 0 2 3.
    Padding belongs to the end of its sequence, where no other token sees it under a causal mask;
    the last sequence has what the micro-batch's length lacks. It is 0 all over but for positions,
    which go on. No samples make padding alone, so that every rank has a forward pass.
    """
    lengths = [layout.padded(len(sample.token_ids) - 1) for sample in samples]
    lengths = lengths or [layout.total_multiple]
    lengths[-1] += -sum(lengths) % layout.total_multiple
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)

    def laid(parts: Iterable[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
        row = np.zeros(cu_seqlens[-1], dtype)
        for start, part in zip(cu_seqlens, parts, strict=False):
            row[start : start + len(part)] = part
        return row

    return MicroBatch(
        token_ids=laid((sample.token_ids[:-1] for sample in samples), np.int32),
        position_ids=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        target_ids=laid((sample.token_ids[1:] for sample in samples), np.int32),
        loss_weight=laid((sample.loss_weight[1:] for sample in samples), np.float32),
        advantage=laid((sample.advantage[1:] for sample in samples), np.float32),
        logprob=laid((sample.logprob[1:] for sample in samples), np.float32),
        cu_seqlens=cu_seqlens,
        sample_ids=tuple(sample.id for sample in samples),
    )


def mini_batches(samples: Sequence[Sample], num: int) -> list[list[Sample]]:
    """Which samples belong to which of a step's `num` updates; some may have none."""
    batches: list[list[Sample]] = [[] for _ in range(num)]
    for sample in samples:
        batches[sample.turn % num].append(sample)
    return batches

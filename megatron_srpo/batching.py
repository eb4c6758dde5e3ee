"""Which sequence is computed where?   samples -> packed micro-batches, balanced over ranks

Pure: every rank computes the same plan from all lengths, then sends its samples where the plan
wants them. Invariants (tested): every sample that carries a gradient is in exactly one
micro-batch; a micro-batch holds at most `max_tokens` tokens unless it is one longer sequence; all
ranks have equally many micro-batches; the heaviest rank has at most the lightest one's tokens
plus one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_srpo.types import MicroBatch, Sample

Plan = list[list[list[int]]]
"""[rank][micro-batch][...] index of a sample"""


def plan_micro_batches(lengths: Sequence[int], *, num_ranks: int, max_tokens: int) -> Plan:
    """Longest sequences first, each to the lightest rank; then first fit into micro-batches.

    >>> plan_micro_batches([5, 3, 3, 2], num_ranks=2, max_tokens=5)
    [[[0], [3]], [[1], [2]]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in longest_first:
        lightest = loads.index(min(loads))
        ranks[lightest].append(index)
        loads[lightest] += lengths[index]
    plan = [_first_fit(indices, lengths, max_tokens) for indices in ranks]
    num_micro_batches = max(len(micro_batches) for micro_batches in plan)
    return [_pad_count(micro_batches, num_micro_batches) for micro_batches in plan]


def _first_fit(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: dict[int, int] = {}
    """Bins that can still hold something: looking at full ones would take time squared."""
    shortest = min((lengths[index] for index in indices), default=0)
    for index in indices:
        number = next((n for n, free in room.items() if lengths[index] <= free), len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        room[number] = room.get(number, max_tokens) - lengths[index]
        if room[number] < shortest:
            del room[number]
    return bins


def _pad_count(micro_batches: list[list[int]], count: int) -> list[list[int]]:
    """Split the fullest micro-batches, then add empty ones, until there are `count`."""
    padded = [list(indices) for indices in micro_batches]
    empty: list[int] = []
    while len(padded) < count:
        fullest = max(padded, key=len, default=empty)
        half = len(fullest) // 2
        padded.append(fullest[:half])
        del fullest[:half]
    return padded


def pack(samples: Sequence[Sample]) -> MicroBatch:
    """Lay sequences end to end; entry t holds what token t predicts, so a sequence loses one.

    Tokens [a b c] [d e] become inputs a b d, targets b c e, positions 0 1 0, cu_seqlens 0 2 3.
    No samples make one token without weight, so that every rank has a forward pass.
    """
    if not samples:
        nothing = np.zeros(1, dtype=np.float32)
        token = np.zeros(1, dtype=np.int32)
        return MicroBatch(
            token_ids=token, position_ids=token, target_ids=token, loss_weight=nothing,
            advantage=nothing, logprob=nothing, sample_ids=(),
            cu_seqlens=np.array([0, 1], dtype=np.int32),
        )  # fmt: skip
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    return MicroBatch(
        token_ids=np.concatenate([sample.token_ids[:-1] for sample in samples]),
        position_ids=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        target_ids=np.concatenate([sample.token_ids[1:] for sample in samples]),
        loss_weight=np.concatenate([sample.loss_weight[1:] for sample in samples]),
        advantage=np.concatenate([sample.advantage[1:] for sample in samples]),
        logprob=np.concatenate([sample.logprob[1:] for sample in samples]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        sample_ids=tuple(sample.id for sample in samples),
    )


def mini_batches(samples: Sequence[Sample], num: int) -> list[list[Sample]]:
    """Which samples belong to which of a step's `num` updates; some may have none."""
    batches: list[list[Sample]] = [[] for _ in range(num)]
    for sample in samples:
        batches[sample.turn % num].append(sample)
    return batches

"""Group advantages on a GPU: one launch, a program a group, sums in order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(128)
AGREE_WITHIN = tl.constexpr(1e-8)


def group_advantage(rewards_R: Tensor, offsets_G1: Tensor, baseline: str, std: str) -> Tensor:
    """As the operation in `group_advantage.py`."""
    advantages_R = torch.empty_like(rewards_R, dtype=torch.float32)
    num_groups = len(offsets_G1) - 1
    if num_groups:
        program_a_group: Any = _group_advantage[(num_groups,)]
        program_a_group(
            advantages_R,
            rewards_R.contiguous(),
            offsets_G1,
            LEAVE_ONE_OUT=baseline == "leave_one_out",
            NORMALIZED=std != "none",
            SAMPLE=std == "sample",
        )
    return advantages_R


@triton.jit
def _group_advantage(
    advantages_ptr,
    rewards_ptr,
    offsets_ptr,
    LEAVE_ONE_OUT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    count = (end - start).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float64)
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_here = place < end
        reward = tl.load(rewards_ptr + place, mask=is_here, other=0.0).to(tl.float64)
        total += reward
        lowest = tl.minimum(lowest, tl.where(is_here, reward, lowest))
        highest = tl.maximum(highest, tl.where(is_here, reward, highest))
    mean = tl.sum(total, 0) / count
    low = tl.min(lowest, 0)
    high = tl.max(highest, 0)
    size = tl.maximum(tl.maximum(tl.abs(low), tl.abs(high)), 1.0)
    differ = high > low + AGREE_WITHIN * size

    scale = 1.0
    if NORMALIZED:
        squares = tl.zeros((BLOCK,), tl.float64)
        for first in range(start, end, BLOCK):
            place = first + tl.arange(0, BLOCK)
            reward = tl.load(rewards_ptr + place, mask=place < end, other=mean).to(tl.float64)
            centred = tl.where(place < end, reward - mean, 0.0)
            squares += centred * centred
        scale = tl.sqrt((count - SAMPLE) / tl.sum(squares, 0))
    if LEAVE_ONE_OUT:
        scale = scale * (count / (count - 1))
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        reward = tl.load(rewards_ptr + place, mask=place < end, other=0.0).to(tl.float64)
        advantage = tl.where(differ, (reward - mean) * scale, 0.0)
        tl.store(advantages_ptr + place, advantage.to(tl.float32), mask=place < end)

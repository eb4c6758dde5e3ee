"""Groups of rewards, awkward ones included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.advantages import GroupNormalized
from tests.unit.builders import config, rewarded

GROUPS: list[list[float]] = [
    [1, 0, 0, 0],
    [0.1] * 7,  # whose mean is not 0.1
    [],
    [3.0],
    [0, 1, 2, 5],
    [1e6 + 1, 1e6],
    [1, 1 + 1e-9],  # agree but for rounding
    [float(x) for x in np.random.default_rng(0).normal(size=300)],
    [-7.25, 0.5],
]


def flat(groups: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Rewards, float64, and offsets."""
    ends = itertools.accumulate(len(group) for group in groups)
    rewards = [reward for group in groups for reward in group]
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor([0, *ends])


def by_the_loop(groups: Sequence[Sequence[float]], **credit: str) -> list[float]:
    """One per reward."""
    rule = GroupNormalized(config(credit=credit))
    credits = rule.assign([rewarded(*group) for group in groups if group])
    return [float(advantage[-1]) for group in credits for _, advantage in group]

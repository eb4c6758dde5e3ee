"""How much better than its group was a rollout?   rewards -> advantages, on a device

    (r - baseline) / std    within each group; exactly 0 where a group's rewards agree

For rewards that are on a device already. The training loop's are host values that each passed
through a Python function, and it assigns credit there: `advantages.GroupNormalized`, in numpy, is
what this operation equals. In float64 inside. Legend: R rewards, G groups.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

AGREE_WITHIN = 1e-8
"""Relative to the largest reward, or to 1 (`types.Group.has_signal`)."""

Baseline = Literal["mean", "leave_one_out"]
Std = Literal["population", "sample", "none"]


def group_advantage(
    rewards_R: Tensor,
    offsets_G1: Tensor,
    *,
    baseline: Baseline = "mean",
    std: Std = "population",
) -> Tensor:
    """[R] fp32 advantages, without a gradient.

    Group g is `rewards_R[offsets_G1[g] : offsets_G1[g + 1]]` (fp32 or float64, finite); offsets
    (int64, on the rewards' device) begin with 0 and end with R. Names as in `credit.*`.
    """
    return torch.ops.megatron_srpo.group_advantage(rewards_R, offsets_G1, baseline, std)


@torch.library.custom_op("megatron_srpo::group_advantage", mutates_args=())
def _group_advantage(rewards_R: Tensor, offsets_G1: Tensor, baseline: str, std: str) -> Tensor:
    lengths_G, wide_R = offsets_G1.diff(), rewards_R.double()

    def of_groups(kind: str, values_R: Tensor) -> Tensor:
        return torch.segment_reduce(values_R, kind, lengths=lengths_G, unsafe=True)

    def on_rewards(values_G: Tensor) -> Tensor:
        return values_G.repeat_interleave(lengths_G)

    spread_G = of_groups("max", wide_R) - of_groups("min", wide_R)
    differ_G = spread_G > AGREE_WITHIN * of_groups("max", wide_R.abs()).clamp(min=1.0)
    centred_R = wide_R - on_rewards(of_groups("sum", wide_R) / lengths_G)
    scale_G = torch.ones_like(spread_G)
    if std != "none":
        num_free_G = lengths_G - int(std == "sample")
        scale_G = (of_groups("sum", centred_R.square()) / num_free_G).rsqrt()
    if baseline == "leave_one_out":
        scale_G = scale_G * lengths_G / (lengths_G - 1)
    return torch.where(on_rewards(differ_G), centred_R * on_rewards(scale_G), 0.0).float()


@_group_advantage.register_kernel("cuda")
def _(rewards_R: Tensor, offsets_G1: Tensor, baseline: str, std: str) -> Tensor:
    from megatron_srpo.kernels import group_advantage_triton

    return group_advantage_triton.group_advantage(rewards_R, offsets_G1, baseline, std)


@_group_advantage.register_fake
def _(rewards_R: Tensor, *_: Any) -> Tensor:
    return rewards_R.new_empty(rewards_R.shape, dtype=torch.float32)


def _differentiate(ctx: Any, by_advantage_R: Tensor) -> Any:
    return None, None, None, None


_group_advantage.register_autograd(_differentiate)

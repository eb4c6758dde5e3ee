"""Every form of the loss, and what is the same of two ways to compute it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_srpo.config import LossConfig
from megatron_srpo.loss import Counters, TokenTensors, to_metrics

LOSSES = {
    "reinforce": LossConfig(),
    "two updates": LossConfig(updates_per_batch=2),
    "ppo": LossConfig(surrogate="ppo", clip_high=0.3),
    "kl": LossConfig(kl_coef=0.3),
    "token_truncate": LossConfig(importance="token_truncate", importance_cap=1.1),
    "token_mask": LossConfig(importance="token_mask", importance_cap=1.1),
    "sequence_truncate": LossConfig(importance="sequence_truncate", importance_cap=1.1),
    "sequence_mask": LossConfig(importance="sequence_mask", importance_cap=1.1),
    "everything": LossConfig(
        surrogate="ppo", kl_coef=0.3, importance="token_truncate", importance_cap=1.1
    ),
}
SEPARABLE = {name: cfg for name, cfg in LOSSES.items() if "sequence" not in name}


def in_fp32(tokens: TokenTensors) -> TokenTensors:
    assert tokens.old_T is not None and tokens.reference_T is not None
    return TokenTensors(
        loss_weight_T=tokens.loss_weight_T.float(),
        advantage_T=tokens.advantage_T.float(),
        rollout_T=tokens.rollout_T.float(),
        old_T=tokens.old_T.float(),
        reference_T=tokens.reference_T.float(),
        cu_seqlens=tokens.cu_seqlens,
    )


def nothing(tokens: TokenTensors) -> tuple[Tensor, TokenTensors]:
    """Log-probs and tokens of which there are none."""
    none = tokens.advantage_T[:0]
    return none, TokenTensors(
        loss_weight_T=none,
        advantage_T=none,
        rollout_T=none,
        old_T=none,
        reference_T=none,
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
    )


def assert_same_counters(found: Counters, right: Counters, *, rel: float) -> None:
    """Also in their names; sums, not only quotients."""
    assert found.quotients.keys() == right.quotients.keys()
    assert found.maxima.keys() == right.maxima.keys()
    for name, (total, count) in right.quotients.items():
        assert found.quotients[name][1] == count, name
        assert found.quotients[name][0].item() == pytest.approx(total.item(), rel=rel, abs=rel)
    assert to_metrics(found) == pytest.approx(to_metrics(right), rel=rel, abs=rel)

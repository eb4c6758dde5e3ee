"""Faults of Megatron-Core 0.16.1 that have nothing to do with CUDA, and the way around each.

The distributed optimizer over torch's own AdamW, which is what Megatron takes where neither
Transformer Engine nor Apex is installed, GPU or not, checkpointed as `fully_reshardable`
(optimizer/distrib_optimizer.py):

1. `state_dict` fails before the first step (`assert len(steps) == 1`): nothing can be loaded into
   a new learner, and a learner that has not stepped cannot be saved.   -> `allocate_states`
2. Loading fails with KeyError 'step': torch's state has one per parameter, the checkpoint one per
   group of parameters.   -> `load_states`
3. Loaded parameters share *one* step tensor, to which each later step adds 1 per parameter: wrong
   bias corrections, silently.   -> `load_states`

4. Where a group holds parameters of two dtypes, states are saved under other parameters' names: the
   inner optimizer has float32 ones first, the index that the checkpoint goes by does not.
   -> the model has one dtype (`layers.RMSNorm`), and `allocate_states` insists on it

tests/parallel/test_upstream.py shows each fault without its way around, and fails when upstream
has mended it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer


def _parts(optimizer: MegatronOptimizer) -> Sequence[Any]:
    """Distributed optimizers; experts, if there are any, have one of their own."""
    chained = isinstance(optimizer, ChainedOptimizer)
    return optimizer.chained_optimizers if chained else [optimizer]


def allocate_states(optimizer: MegatronOptimizer) -> None:
    """Adam's state of parameters that have none yet, as their first step would begin with it."""
    for part in _parts(optimizer):
        dtypes = {buffer.param_dtype for buffer in part.buffers}
        assert len(dtypes) == 1, f"optimizer states of mixed dtypes would be mixed up: {dtypes}"
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))


def load_states(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """`optimizer.load_state_dict(state)`; `state` is what was saved as `sharded_state_dict`."""
    parts = _parts(optimizer)
    if not isinstance(parts[0].optimizer, torch.optim.AdamW):
        optimizer.load_state_dict(state)
        return
    states = [state] if len(parts) == 1 else [state[key] for key in sorted(state)]
    for part, given in zip(parts, states, strict=True):
        tensors = given.pop("param_state")
        part.load_state_dict(given)
        held = list(part.optimizer.state.values())
        steps = [each.pop("step") for each in held]
        part.load_parameter_state_from_fully_reshardable(tensors)
        for each, step in zip(held, steps, strict=True):
            each["step"] = step.clone()

"""Faults of Megatron-Core 0.16.1 that have nothing to do with CUDA, and the way around each.

The writers of a checkpoint, which are forked (strategies/filesystem_async.py):

1. What they tell their rank travels through a process that each rank spawns for it. It imports
   torch and the main module again (seconds in the first save, 275 MB a rank), and where the rank is
   killed it stays for ever.   -> `Results`
2. Where the rank is killed they write on: the same command, at once, finds somebody at work.
   -> `forked_end_with_this`

The distributed optimizer over torch's own AdamW, which is what Megatron takes where neither
Transformer Engine nor Apex is installed, GPU or not, checkpointed as `fully_reshardable`
(optimizer/distrib_optimizer.py):

1. `state_dict` fails before the first step (`assert len(steps) == 1`): nothing can be loaded into
   a new learner, and a learner that has not stepped cannot be saved.   -> `allocate_states`
2. Loading fails with KeyError 'step': torch's state has one per parameter, the checkpoint one per
   group of parameters.   -> `load_states`
3. Loaded parameters share *one* step tensor, to which each later step adds 1 per parameter: wrong
   bias corrections, silently.   -> `load_states`
4. Experts that are shared have an optimizer of their own, whose part of a checkpoint only a run can
   load that shares them too.   -> `sharded_states`: number of steps and tensors are all that is
   saved; what else a group of parameters has, the config and the schedule say again
5. An optimizer that is partly in host memory (`HybridDeviceOptimizer`) gets its first state only by
   a step on random gradients, which would be saved; without `use_precision_aware_optimizer`, and of
   float32 parameters, its state cannot be loaded (KeyError).   -> `allocate_hybrid`,
   `optimizer.MegatronAdam`; read, never run: it needs a GPU
6. Where a group holds parameters of two dtypes, states are saved under other parameters' names: the
   inner optimizer has float32 ones first, the index that the checkpoint goes by does not.
   -> the model has one dtype (`layers.RMSNorm`; weights in FP8 are bf16 to the optimizer), and
   `allocate_states` insists on it
7. Weights that are held in FP8 (`fp8.py`) are loaded after another rounding: from what they were as
   bf16.   -> `write_weights`, from what the optimizer holds

tests/parallel/test_upstream.py shows each fault without its way around, and fails when upstream
has mended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import queue
import signal
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def parts_of(optimizer: MegatronOptimizer) -> Sequence[Any]:
    """Distributed optimizers; experts, if there are any, have one of their own."""
    chained = isinstance(optimizer, ChainedOptimizer)
    return optimizer.chained_optimizers if chained else [optimizer]


def allocate_states(optimizer: MegatronOptimizer) -> None:
    """Adam's state of parameters that have none yet, as their first step would begin with it."""
    for part in parts_of(optimizer):
        dtypes = {buffer.param_dtype for buffer in part.buffers}
        assert len(dtypes) == 1 or torch.float32 not in dtypes, (
            f"optimizer states of mixed dtypes would be mixed up: {dtypes}"
        )
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            allocate_hybrid(part.optimizer)
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))


def allocate_hybrid(hybrid: Any) -> None:
    """The same of an optimizer in two places."""
    for adam in hybrid.sub_optimizers:
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            state = adam.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(parameter))
            if isinstance(adam, torch.optim.AdamW):
                state.setdefault("step", torch.zeros(()))
    hybrid._sync_sub_optimizers_state_to_hdo()


def sharded_states(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    metadata: dict[str, Any],
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Number of steps, and the state of every parameter under the parameter's own name."""
    allocate_states(optimizer)
    parts = parts_of(optimizer)
    of_parts = [
        part.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        for part in parts
    ]
    return {
        "step": _num_steps(parts[0].optimizer),
        "states": {str(index): each["param_state"] for index, each in enumerate(of_parts)},
    }


def _num_steps(adam: Any) -> int:
    """Torch's Adam counts for each parameter, Transformer Engine's and Apex' for each group."""
    if isinstance(adam, HybridDeviceOptimizer):
        return _num_steps(adam.sub_optimizers[0])
    if isinstance(adam, torch.optim.AdamW):
        return int(next(iter(adam.state.values()))["step"])
    return int(adam.param_groups[0].get("step", 0))


def load_states(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """`state` is what was saved as `sharded_states`."""
    for index, part in enumerate(parts_of(optimizer)):
        for held in part.optimizer.state.values():
            held.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(state["states"][str(index)])
        is_hybrid = isinstance(part.optimizer, HybridDeviceOptimizer)
        for adam in part.optimizer.sub_optimizers if is_hybrid else [part.optimizer]:
            _set_step(adam, state["step"])


def _set_step(adam: Any, step: int) -> None:
    """A tensor for each parameter of torch's: a shared one counts too often."""
    if isinstance(adam, torch.optim.AdamW):
        for held in adam.state.values():
            held["step"] = torch.tensor(float(step))
    else:
        for group in adam.param_groups:
            group["step"] = step


def write_weights(optimizer: MegatronOptimizer) -> None:
    """The model's, of the optimizer's own and on all ranks, as a step ends."""
    for part in parts_of(optimizer):
        if part.config.reuse_grad_buf_for_mxfp8_param_ag:
            part._copy_main_params_to_param_buffer()
        else:
            part._copy_main_params_to_model_params()
        for chunk in part.model_chunks:
            chunk.start_param_sync(force_sync=True)


class Results:
    """A queue for one message from whoever was forked: memory without a name, open on both
    sides."""

    def __init__(self) -> None:
        self._memory = open(os.memfd_create("results"), "r+b", buffering=0)  # noqa: SIM115

    def put(self, results: Any) -> None:
        self._memory.seek(0)
        self._memory.write(pickle.dumps(results))

    def get_nowait(self) -> Any:
        """Raises `queue.Empty` where nothing has been put."""
        self._memory.seek(0)
        content = self._memory.read()
        self._memory.truncate(0)
        if not content:
            raise queue.Empty
        return pickle.loads(content)


PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_forked_end_with_parent = ContextVar("forked_end_with_parent", default=False)


@contextlib.contextmanager
def forked_end_with_this() -> Iterator[None]:
    """What is forked meanwhile by this thread, and what that forks, is killed when its parent is
    gone."""
    token = _forked_end_with_parent.set(True)
    try:
        yield
    finally:
        _forked_end_with_parent.reset(token)


def _end_with_parent() -> None:
    if _forked_end_with_parent.get():
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


os.register_at_fork(after_in_child=_end_with_parent)


def install_results() -> None:
    """For the checkpoints that this process writes from now on, one at a time."""
    filesystem_async._results_queue = Results()

"""What does the learner need to go on?   learner <-> torch_dist checkpoint, on any layout

Weights, optimizer and learning-rate schedule, each tensor under the name that it has in Megatron's
own checkpoints, the optimizer's in the shapes of its parameters (`fully_reshardable`). Random
states are left out: every draw of this package is a function of the seed and of counters
(`seeding.py`), and there is no dropout.

What Transformer Engine knows of FP8 scales is saved with each layer (`_extra_state`). A checkpoint
that another backend or recipe has written lacks it, or has it in vain: scales then begin anew.
Weights that are held in FP8 are saved as the bf16 that they stand for.

Writers are processes that Megatron forks. Its persistent worker, the other way, asks for
`torch.cuda.device_count()` and needs one at least; and where it lives, it keeps CUDA contexts.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_save_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_srpo.checkpoint_store import damaged
from megatron_srpo.engines.megatron import upstream
from megatron_srpo.engines.megatron.fp8 import make_plain
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.staging import on_disk
from megatron_srpo.types import AlarmError

SCALES = "_extra_state"
"""In the name of what a layer stores besides tensors."""
UNREADABLE = (CheckpointingException, OSError, EOFError, pickle.UnpicklingError, ValueError)
"""What Megatron and torch raise over damaged metadata."""


class CheckpointWriter:
    """Writes one checkpoint at a time. Every call is collective."""

    def __init__(
        self,
        learner: MegatronLearner,
        *,
        asynchronous: bool,
        gather: Callable[[list[str]], list[list[str]]],
    ) -> None:
        """`gather`: every rank's value, on every rank (`Mesh.gather`)."""
        self._learner, self._asynchronous, self._gather = learner, asynchronous, gather
        self._queue = AsyncCallsQueue()
        self._folder = Path()
        upstream.install_results()

    def begin(self, folder: Path, *, wait: bool = False) -> None:
        """Into an empty folder. Comes back when the state is copied; if it is to wait, or not
        asynchronous, when it is written. Raises `AlarmError` if it could not be."""
        self._folder = folder
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), _copies_group()
        )
        state = sharded_state(self._learner, is_loading=False)
        with self._on_disk(), upstream.forked_end_with_this():
            request: Any = dist_checkpointing.save(
                state, str(folder), strategy, async_sharded_save=True
            )
            if self._asynchronous and not wait:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()

    def is_done(self, *, wait: bool) -> bool:
        """Whether what was begun is on disk, on all ranks; Megatron's metadata come last.

        Raises `AlarmError` if it could not be written.
        """
        with self._on_disk():
            self._queue.maybe_finalize_async_calls(blocking=wait)
        return self._queue.get_num_unfinalized_calls() == 0

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        """`AlarmError` if the operating system refuses, here or to one of the writers."""
        try:
            with on_disk(self._folder):
                yield
        except CheckpointException as error:
            # On all ranks; only the first knows what has happened.
            said = self._gather([_line(failure) for failure, _ in error.failures.values()])[0]
            free = shutil.disk_usage(self._folder).free / 2**30
            raise AlarmError(
                f"{self._folder} could not be written: {'; '.join(said)} ({free:.1f} GiB are free "
                "there); mend that and start again"
            ) from error


def load_checkpoint(learner: MegatronLearner, folder: Path) -> None:
    """Collective: the learner is then the one that was saved, on whatever layout that was.

    Raises `InputError`, on every rank, if what is in the folder cannot be read.
    """
    wanted = sharded_state(learner, is_loading=True)
    _check_common(folder)
    try:
        stored = load_sharded_metadata(str(folder))
        for name in _chunks(learner):
            wanted[name] = _without_new_scales(wanted[name], stored)
        loaded: Any = dist_checkpointing.load(wanted, str(folder))
    except CheckpointException as error:  # torch's, around what happened on each rank
        raise damaged(folder.parent, _line(next(iter(error.failures.values()))[0])) from error
    except UNREADABLE as error:
        raise damaged(folder.parent, _line(error)) from error
    for name, module in _chunks(learner).items():
        scales = {key: own for key, own in module.state_dict().items() if SCALES in key}
        module.load_state_dict(scales | loaded[name])
    learner.optimizer.load(loaded["optimizer"], loaded["schedule"])


def _without_new_scales(wanted: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Of a chunk's state, what is stored, and all tensors."""
    return {
        name: entry
        for name, entry in wanted.items()
        if not isinstance(entry, ShardedObject) or entry.unique_key in stored
    }


def _check_common(folder: Path) -> None:
    """What all ranks read alike. Alone, because torch has no narrower error for it than the one
    that a lost connection or a full GPU raises."""
    try:
        dist_checkpointing.load_common_state_dict(str(folder))
    except (RuntimeError, *UNREADABLE) as error:
        raise damaged(folder.parent, _line(error)) from error


def _line(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}", width=160, placeholder=" ...")


def sharded_state(learner: MegatronLearner, *, is_loading: bool) -> dict[str, Any]:
    """What of the learner's state this rank holds, and where that belongs in the whole."""
    metadata = {
        "dp_cp_group": _copies_group(),
        "distrib_optim_sharding_type": "fully_reshardable",
    }
    chunks = {
        name: module.sharded_state_dict(metadata=metadata)
        for name, module in _chunks(learner).items()
    }
    # Which parameter is whose it knows by the parameters themselves, so they are made plain later.
    optimizer = learner.optimizer.sharded_state(chunks, metadata, is_loading=is_loading)
    make_plain(chunks)
    return {
        **chunks,
        "optimizer": optimizer,
        "schedule": learner.optimizer.schedule_state(),
    }


def _chunks(learner: MegatronLearner) -> dict[str, Any]:
    """By Megatron's names for the parts of an interleaved pipeline, or of any other."""
    if len(learner.modules) == 1:
        return {"model": learner.modules[0]}
    return {f"model{index}": module for index, module in enumerate(learner.modules)}


def _copies_group() -> Any:
    """The ranks that hold the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)

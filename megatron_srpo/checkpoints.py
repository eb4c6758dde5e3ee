"""When is a run's state saved, and when does a checkpoint count?   loop -> checkpoints/

    checkpoints/000012.partial/   state.json, hf/; megatron/ by all ranks; manifest.json last
    checkpoints/000012/           the same, renamed

While writers work the run goes on; at each step's end the ranks ask each other whether all are
done, and the first rank publishes what is. One checkpoint is written at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_srpo.checkpoint_folder import hf_part, megatron_part, write_manifest
from megatron_srpo.checkpoint_store import (
    RunState,
    find,
    kept,
    partial_place,
    place,
    publish,
    remove,
)
from megatron_srpo.config import Config
from megatron_srpo.engines.megatron.checkpoint import CheckpointWriter, load_checkpoint
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.hf_writer import copy_all_but_weights, state_dtype
from megatron_srpo.protocols import PromptSource
from megatron_srpo.staging import on_disk
from megatron_srpo.types import AlarmError

CONTENTS = ("model", "optimizer", "schedule", "state")


class Checkpoints:
    """Of one run. Every call is collective."""

    def __init__(
        self, folder: Path, cfg: Config, *, learner: MegatronLearner, data: PromptSource, mesh: Mesh
    ) -> None:
        self._folder, self._cfg = folder, cfg
        self._learner, self._data, self._mesh = learner, data, mesh
        self._writer = CheckpointWriter(
            learner, asynchronous=cfg.checkpoint.asynchronous, gather=mesh.gather
        )
        self._open: int | None = None
        """The step whose checkpoint is being written."""
        self._done, self._position = 0, data.state_dict()
        """Steps done, and where the data stood then."""
        self._newest = 0
        """Of all checkpoints; what begins without one needs none."""

    def after(self, step: int) -> None:
        """When `step` steps are done. Raises `AlarmError` if a checkpoint cannot be written."""
        every = self._cfg.checkpoint.every
        self._done, self._position = step, self._data.state_dict()
        self._publish(wait=False)
        if every and (step % every == 0 or step == self._cfg.num_steps):
            self._publish(wait=True)
            self._begin()
            self._publish(wait=False)

    def save(self) -> None:
        """What the last whole step has left, unless it is there; comes back when it is on disk."""
        self._publish(wait=True)
        if self._newest < self._done:
            self._begin(wait=True)
            self._publish(wait=True)

    def finish(self) -> None:
        """Waits for what is being written."""
        self._publish(wait=True)

    def load(self, checkpoint: Path) -> None:
        """Learner and data go on from there."""
        load_checkpoint(self._learner, megatron_part(checkpoint))
        state = RunState.read(checkpoint)
        self._data.load_state_dict(state.data)
        self._done = self._newest = state.step
        self._position = state.data

    def _begin(self, *, wait: bool = False) -> None:
        step = self._done
        partial = partial_place(self._folder, step)
        state = RunState(step=step, data=self._position, layout=self._layout())

        def prepare() -> None:
            remove(partial)
            megatron_part(partial).mkdir(parents=True)
            hf_part(partial).mkdir()
            copy_all_but_weights(self._cfg.model, hf_part(partial))
            dtype = getattr(torch, self._cfg.dtype)
            state_dtype(hf_part(partial) / "config.json", dtype)
            state.write(partial)

        self._on_first_rank(prepare)
        self._writer.begin(megatron_part(partial), wait=wait)
        self._open = step

    def _publish(self, *, wait: bool) -> None:
        if self._open is None or not self._writer.is_done(wait=wait):
            return
        step, self._open = self._open, None
        partial = partial_place(self._folder, step)

        def finish() -> None:
            write_manifest(partial, dtype=self._cfg.dtype, contents=CONTENTS)
            publish(partial, place(self._folder, step))
            self._tidy()

        self._on_first_rank(finish)
        self._newest = step

    def _tidy(self) -> None:
        """After a success: what the rules do not keep goes, and what was never finished."""
        cfg = self._cfg.checkpoint
        whole, torn = find(self._folder)
        stay = kept(whole, keep_last=cfg.keep_last, keep_every=cfg.keep_every)
        for path in [*torn, *(path for step, path in whole.items() if step not in stay)]:
            remove(path)

    def _layout(self) -> dict[str, int]:
        sizes = self._mesh.parallel.model_dump(include={"tp", "pp", "vpp", "cp", "ep"})
        return {"processes": self._mesh.world_size, **sizes}

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        """All wait for it; a full disk there is an alarm everywhere."""
        problem: str | None = None
        if self._mesh.rank == 0:
            try:
                with on_disk(self._folder):
                    work()
            except AlarmError as alarm:
                problem = str(alarm)
        problem = self._mesh.gather(problem)[0]
        if problem is not None:
            raise AlarmError(problem)

"""Where does a run begin?   run folder -> first step, checkpoint, rollouts that are there already

A folder with a finished run (it has `hf/`) is refused. An unfinished one goes on, if its config is
the same but for how the work is divided: from the newest whole checkpoint, or else from the first
step. The rollouts of later steps that the journal holds are not drawn again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srpo.checkpoint_store import find
from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.journal import drop_from, is_whole
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import InputError

MAY_DIFFER = (
    "run_dir", "max_logprob_diff", "parallel", "micro_batch_tokens", "rollout.tp",
    "rollout.max_num_seqs", "rollout.kv_cache_bytes", "checkpoint", "log", "sft",
)  # fmt: skip
"""What changes neither what is drawn nor what is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int
    """The first that is to be done."""
    checkpoint: Path | None
    """The state after `step` steps; None: the initial one."""
    journalled: range
    """Steps, from `step` on, whose rollouts are there."""
    torn: tuple[str, ...]
    """Names of checkpoints that are not whole."""

    @property
    def summary(self) -> str:
        """For the log; nothing where there is nothing to tell."""
        words = [f"{name} is no whole checkpoint and is ignored" for name in self.torn]
        if self.checkpoint:
            words.append(f"goes on after step {self.step} from {self.checkpoint}")
        if self.journalled:
            words.append(f"the rollouts of {len(self.journalled)} steps are in the journal")
        return "; ".join(words)


BEGINNING = Progress(step=0, checkpoint=None, journalled=range(0), torn=())


def progress_of(cfg: Config) -> Progress:
    """Raises `InputError` if the run folder holds a finished run, or one of another config."""
    folder = RunFolder(cfg.run_dir)
    if not folder.is_unfinished:
        folder.check_free()
        return BEGINNING
    _check_same(load_config(folder.config), cfg, folder)
    folder.check_idle()
    whole, torn = find(folder.checkpoints)
    step = max(whole, default=0)
    end = step
    while end < cfg.num_steps and is_whole(folder.rollouts, end):
        end += 1
    return Progress(
        step=step,
        checkpoint=whole.get(step),
        journalled=range(step, end),
        torn=tuple(path.name for path in torn),
    )


def rewind(folder: RunFolder, progress: Progress) -> None:
    """Metrics end where the checkpoint was made, the journal with its last whole step."""
    drop_from(folder.rollouts, progress.journalled.stop)
    if not folder.metrics.exists():
        return
    # A line without its end was cut off; what follows the checkpoint is written again.
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    stay = [line for line in whole if json.loads(line)["step"] < progress.step]
    os.truncate(folder.metrics, sum(map(len, stay)))


def _check_same(before: Config, now: Config, folder: RunFolder) -> None:
    old, new = _fields(before), _fields(now)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise InputError(
                f"run_dir={folder.root}: holds an unfinished run with {name}={old.get(name)}, not "
                f"{new.get(name)}; go on with its own {folder.config.name}, or name a new folder "
                "(run_dir=PATH)"
            )


def _fields(cfg: Config) -> dict[str, Any]:
    """Dotted name -> value, of what must not differ."""
    flat: dict[str, Any] = {}

    def collect(values: dict[str, Any], above: str) -> None:
        for key, value in values.items():
            name = above + key
            if name in MAY_DIFFER:
                continue
            if isinstance(value, dict):
                collect(value, name + ".")
            else:
                flat[name] = value

    collect(cfg.model_dump(), "")
    return flat

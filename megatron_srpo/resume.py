"""Where does a run begin?   run folder -> first step, checkpoint, rollouts that are there already

An unfinished run goes on, if its config is the same but for how the work is divided: from the
newest whole checkpoint, or else from the first step. The rollouts of later steps that the journal
holds are not drawn again. With a finished one (it has `hf/`) of the same config nothing is to do.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_srpo.checkpoint_store import RunState, find
from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.journal import drop_from, is_whole
from megatron_srpo.kept import drop_before
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.staging import leftovers
from megatron_srpo.types import InputError

MAY_DIFFER = (
    "run_dir", "max_logprob_diff", "mismatch", "backend", "parallel", "kernels",
    "micro_batch_tokens", "reward_timeout_s", "reward_workers", "sandbox", "rollout.tp",
    "rollout.max_num_seqs", "rollout.kv_cache_bytes", "optimizer.offload_fraction", "colocation",
    "checkpoint", "deadlines", "log", "sft",
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
    is_finished: bool = False
    """Nothing is left to do."""

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


def progress_of(cfg: Config, replay: Path | None = None) -> Progress:
    """Raises `InputError` if the run folder holds a run of another config, or one that was begun
    with another `replay` (the folder of the run whose rollouts it trains on)."""
    folder = RunFolder(cfg.run_dir)
    if not folder.is_begun or (folder.hf.exists() and not folder.is_finished):
        folder.check_free()
        return BEGINNING
    _check_same(load_config(folder.config), cfg, folder)
    _check_same_replay(replay, folder)
    if folder.is_finished:
        return replace(BEGINNING, step=cfg.num_steps, is_finished=True)
    whole, torn = find(folder.checkpoints)
    step = max(whole, default=0)
    if whole:
        RunState.read(whole[step])  # only for what it refuses
    end = step
    while end < cfg.num_steps and is_whole(folder.rollouts, end):
        end += 1
    return Progress(
        step=step,
        checkpoint=whole.get(step),
        journalled=range(step, end),
        torn=tuple(path.name for path in torn),
    )


def begin(cfg: Config, seen: Sequence[Progress], replay: Path | None = None) -> None:
    """In a process that is alone at work there, makes the run folder what it was at that step.

    `seen`: what `progress_of` said to each rank before. Raises `InputError`, and changes nothing,
    if another process has worked there since.
    """
    folder, progress = RunFolder(cfg.run_dir), progress_of(cfg, replay)
    if any(before != progress for before in seen):
        raise InputError(
            f"run_dir={folder.root}: another process was at work there meanwhile; start again"
        )
    rewind(folder, progress)
    folder.create(cfg, replay)


def rewind(folder: RunFolder, progress: Progress) -> None:
    """Metrics end where the checkpoint was made, the journal with its last whole step; of an export
    or a preflight that was killed nothing stays.

    Raises `InputError` if a line of the metrics, not the last one, cannot be read.
    """
    size = sum(length for step, length in _lines(folder.metrics) if step < progress.step)
    drop_from(folder.rollouts, progress.journalled.stop)
    drop_before(folder.kept, progress.journalled.stop)
    for half_written in leftovers(folder.hf):
        shutil.rmtree(half_written)
    for probe in folder.probes():
        probe.unlink(missing_ok=True)
    if folder.metrics.exists():
        os.truncate(folder.metrics, size)


def _lines(metrics: Path) -> Iterator[tuple[int, int]]:
    """(step, bytes) of each whole line; the last one may have been cut off."""
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                return
            raise InputError(
                f"{metrics}: line {number} cannot be read; remove that line to go on"
            ) from error
        if line.endswith(b"\n"):
            yield step, len(line)


def _check_same_replay(replay: Path | None, folder: RunFolder) -> None:
    kind = _kind(folder)
    before = folder.replay.read_text("utf-8").strip() if folder.replay.is_file() else None
    now = None if replay is None else str(replay.resolve())
    if before != now:
        was = f"with --replay {before}" if before else "without --replay"
        raise InputError(
            f"run_dir={folder.root}: holds {kind} that was begun {was}; go on {was}, or name a "
            "new folder (run_dir=PATH)"
        )


def _check_same(before: Config, now: Config, folder: RunFolder) -> None:
    old, new = decisive_fields(before), decisive_fields(now)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise InputError(
                f"run_dir={folder.root}: holds {_kind(folder)} with {name}={old.get(name)}, not "
                f"{new.get(name)}; go on with its own {folder.config.name}, or name a new folder "
                "(run_dir=PATH)"
            )


def _kind(folder: RunFolder) -> str:
    return "a finished run" if folder.is_finished else "an unfinished run"


def decisive_fields(cfg: Config) -> dict[str, Any]:
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

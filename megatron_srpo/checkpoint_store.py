"""Which checkpoints does a run have, and which stay?   checkpoints/000012/ after 12 steps

What is not whole is no checkpoint: a folder under its temporary name (`.partial`), one without a
manifest, one whose files are not those that the manifest counts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_srpo import staging
from megatron_srpo.checkpoint_folder import MANIFEST, read_manifest
from megatron_srpo.types import InputError

STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run needs besides its learner to go on. Whatever is drawn follows from it."""

    step: int
    """Steps done."""
    data: dict[str, int]
    """`PromptSource.state_dict()`."""
    layout: dict[str, int]
    """Of the processes that saved, for whoever looks: any other loads it too."""

    def write(self, folder: Path) -> None:
        (folder / STATE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Raises `InputError` if the checkpoint has none that can be read."""
        try:
            state = cls(**json.loads((folder / STATE).read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise damaged(folder, f"{STATE}: {error}") from error
        return state


def damaged(checkpoint: Path, what: str) -> InputError:
    """For a checkpoint that is whole by its manifest and yet cannot be read."""
    return InputError(
        f"{checkpoint}: cannot be read ({what}); remove it to go on from an older checkpoint"
    )


def place(folder: Path, step: int) -> Path:
    """Of the checkpoint after `step` steps."""
    return folder / f"{step:06d}"


def partial_place(folder: Path, step: int) -> Path:
    """Of the same while it is being written."""
    return folder / f"{step:06d}.partial"


def find(folder: Path) -> tuple[dict[int, Path], list[Path]]:
    """(whole checkpoints by step; folders that are none)"""
    whole: dict[int, Path] = {}
    torn: list[Path] = []
    for path in sorted(folder.glob("[0-9]*")):
        step, _, rest = path.name.partition(".")
        if not path.is_dir() or not step.isdecimal() or rest not in ("", "partial"):
            continue  # not ours
        if not rest and _is_whole(path):
            whole[int(step)] = path
        else:
            torn.append(path)
    return whole, torn


def _is_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except InputError:
        return False
    return True


def kept(steps: Iterable[int], *, keep_last: int, keep_every: int) -> set[int]:
    """The newest `keep_last`, and those of every `keep_every` steps (0: no others)."""
    known = sorted(steps)
    regular = {step for step in known if keep_every and step % keep_every == 0}
    return {*known[-keep_last:], *regular}


def publish(partial: Path, path: Path) -> None:
    """Whole and on disk, then under its name; what was there, which was none, is removed."""
    remove(path)
    staging.publish(partial, path)


def remove(path: Path) -> None:
    """Its manifest first: half-removed it is no checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)

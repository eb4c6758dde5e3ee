"""Every step's rollouts, durable before they are trained on.   groups <-> files

Step 12 of replica 0 of 2 is `rollouts/000012-00000-of-00002.jsonl` (one line per group: texts,
scores, resets) and `.npz` (token ids, log-probs). Each file is written under a temporary name,
synced and renamed, the .jsonl last: where it is, the step is whole. Same seed, same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np

from megatron_srpo.protocols import Collect
from megatron_srpo.staging import write_durably
from megatron_srpo.types import Group, InputError, Prompt, Reset, Rollout, Score, Thought

T = TypeVar("T")
PART = re.compile(r"(\d{6,})-\d{5,}-of-(\d{5,})\.(npz|jsonl)(\.partial)?")
"""What a file of the journal is called: its step, the number of replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """One replica's writer."""

    folder: Path
    replica: int
    num_replicas: int
    held: range = range(0)
    """Steps whose rollouts are there already, maybe in the parts of another number of replicas."""

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Raises `AlarmError` if the disk refuses."""
        if step in self.held:
            return
        stem = self.folder / f"{step:06d}-{self.replica:05d}-of-{self.num_replicas:05d}"
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        arrays = BytesIO()
        np.savez(
            arrays,
            prompt_token_ids=flat([group.prompt.token_ids for group in groups], np.int32),
            prompt_lengths=np.array([len(group.prompt.token_ids) for group in groups]),
            token_ids=flat([rollout.token_ids for rollout in rollouts], np.int32),
            logprobs=flat([rollout.logprobs for rollout in rollouts], np.float32),
            lengths=np.array([len(rollout.token_ids) for rollout in rollouts]),
        )
        lines = "".join(_line(_row(group)) for group in groups)
        write_durably(stem.with_suffix(".npz"), arrays.getvalue())
        write_durably(stem.with_suffix(".jsonl"), lines.encode())


def read_step(folder: Path, step: int) -> list[Group]:
    """All replicas' groups of one step, in replica order. `InputError` if a part is missing."""
    return [group for part in _parts(folder, step) for group in _readable(_read_part, part)]


def check_replay(folder: Path, prompt_ids: Sequence[str], *, step: int) -> None:
    """Raises `InputError` unless the journal holds this step's rollouts of these prompts."""
    rows = [row for part in _parts(folder, step) for row in _readable(_rows, part)]
    missing = set(prompt_ids) - {row["prompt"]["id"] for row in rows}
    if missing:
        raise InputError(
            f"{folder}: step {step} has no rollouts of prompt {min(missing)!r}; a replay needs "
            "the data, seed and number of prompts of its run"
        )


def is_whole(folder: Path, step: int) -> bool:
    """All parts of the step's rollouts are there and can be read."""
    try:
        read_step(folder, step)
    except InputError:
        return False
    return True


def drop_from(folder: Path, step: int) -> None:
    """Removes what there is of that step and of later ones; what is not the journal's stays."""
    for path in sorted(folder.glob("*-*-of-*")):
        part = PART.fullmatch(path.name)
        if part and int(part[1]) >= step:
            path.unlink()


def _parts(folder: Path, step: int) -> list[Path]:
    found = sorted(folder.glob(f"{step:06d}-*-of-*.jsonl"))
    parts = [path for path in found if PART.fullmatch(path.name)]
    if not parts:
        raise InputError(f"{folder}: no rollouts of step {step}")
    num_replicas = int(parts[0].stem.rpartition("-of-")[2])
    if len(parts) != num_replicas:
        raise InputError(f"{folder}: step {step} has {len(parts)} of {num_replicas} parts")
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Implements `protocols.Collect`: the journalled groups of the prompts it is asked for."""

    folder: Path

    def __call__(self, prompts: Sequence[Prompt], *, step: int) -> list[Group]:
        wanted = {prompt.id for prompt in prompts}
        groups = read_step(self.folder, step)
        return [group for group in groups if group.prompt.id in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Implements `protocols.Collect`: what the journal holds is not drawn again."""

    replay: Replay
    held: range
    """Steps."""
    draw: Collect

    def __call__(self, prompts: Sequence[Prompt], *, step: int) -> list[Group]:
        collect = self.replay if step in self.held else self.draw
        return collect(prompts, step=step)


def _row(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "prompt": {
            "id": prompt.id,
            "text": prompt.text,
            "answer": prompt.answer,
            "solution": prompt.solution,
        },
        "use": group.use,
        "resets": [_plain(reset) for reset in group.resets],
        "rollouts": [
            {
                "id": rollout.id,
                "stage": rollout.stage,
                "score": _plain(rollout.score),
                "thoughts": [_plain(thought) for thought in rollout.thoughts],
                "num_copied": rollout.num_copied,
                "seed_id": rollout.seed_id,
                "finish_reason": rollout.finish_reason,
                "num_cached_tokens": rollout.num_cached_tokens,
                "weight_version": rollout.weight_version,
            }
            for rollout in group.rollouts
        ],
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=_number) + "\n"


def _number(value: Any) -> Any:
    """Of numpy's, where a rule or reward of the user's gives one."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON")


def _readable(read: Callable[[Path], list[T]], part: Path) -> list[T]:
    """What `read` gives; `InputError` if the disk or somebody's hand has damaged the part."""
    try:
        return read(part)
    except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"{part.with_suffix('')}: cannot be read ({error!r})") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def _read_part(path: Path) -> list[Group]:
    if not path.with_suffix(".npz").is_file():
        raise InputError(f"{path.with_suffix('.npz')}: is missing")
    with np.load(path.with_suffix(".npz")) as arrays:
        prompt_ids = unflat(arrays["prompt_token_ids"], arrays["prompt_lengths"])
        token_ids = iter(unflat(arrays["token_ids"], arrays["lengths"]))
        logprobs = iter(unflat(arrays["logprobs"], arrays["lengths"]))
    groups = []
    for row, ids in zip(_rows(path), prompt_ids, strict=True):
        known = row["prompt"] | {"solution": tuple(row["prompt"]["solution"])}
        prompt = Prompt(**known, token_ids=ids)
        rollouts = [
            _rollout(columns, prompt, next(token_ids), next(logprobs))
            for columns in row["rollouts"]
        ]
        resets = tuple(Reset(**reset) for reset in row["resets"])
        groups.append(Group(prompt=prompt, rollouts=tuple(rollouts), resets=resets, use=row["use"]))
    return groups


def _plain(noun: Score | Thought | Reset) -> dict[str, Any]:
    """Field by field; `dataclasses.asdict` copies deeply and takes ten times as long."""
    return {entry.name: getattr(noun, entry.name) for entry in fields(noun)}


def _rollout(columns: dict[str, Any], prompt: Prompt, token_ids: Any, logprobs: Any) -> Rollout:
    return Rollout(
        **columns
        | {
            "score": Score(**columns["score"]),
            "thoughts": tuple(Thought(**thought) for thought in columns["thoughts"]),
        },
        prompt=prompt,
        token_ids=token_ids,
        logprobs=logprobs,
    )


def flat(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """One after the other."""
    return np.concatenate([*arrays, np.empty(0, dtype)]).astype(dtype)


def unflat(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The arrays again; one empty array of no lengths."""
    return np.split(flat, np.cumsum(lengths)[:-1])

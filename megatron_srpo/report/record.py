"""What does a run folder say?   files -> plain values, and the names of what is missing

A run that was killed, or goes on just now, has a record too: whatever cannot be read is named in
`missing` and left out.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.journal import PART, read_step
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import Group, InputError

PROGRESS = re.compile(r"\S.* \d+/\d+  .*s left")
"""A step's line in log.txt."""
MOST_LINES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What is known of a run but for its rollouts, which are read step by step."""

    name: str
    """Unlike that of any other run of the report."""
    folder: RunFolder
    cfg: Config | None
    metrics: tuple[dict[str, float], ...]
    """Finite ones, a row a step, in order."""
    steps: tuple[int, ...]
    """Those whose rollouts are on record."""
    state: str
    alarms: tuple[str, ...]
    """What the log says of why it stopped."""
    remarks: tuple[str, ...]
    """Everything else in the log that is no step's line; the last `MOST_LINES`."""
    missing: tuple[str, ...]


def read_runs(roots: list[Path]) -> list[RunRecord]:
    """Raises `InputError` for a folder in which no run has left anything."""
    names = _short_names([root.resolve() for root in roots])
    return [_read_run(root, name) for root, name in zip(roots, names, strict=True)]


def read_groups(run: RunRecord, step: int) -> tuple[list[Group], str | None]:
    """A step's groups; or none, and why they cannot be read."""
    try:
        return read_step(run.folder.rollouts, step), None
    except InputError as error:
        return [], str(error)


def _short_names(roots: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for num_parts in range(1, max(len(root.parts) for root in roots) + 1):
        names = ["/".join(root.parts[-num_parts:]) for root in roots]
        if len({*names}) == len(names):
            return names
    raise InputError(f"{roots[0]}: is named twice")


def _read_run(root: Path, name: str) -> RunRecord:
    folder = RunFolder(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such run folder")
    if not any(path.exists() for path in (folder.config, folder.metrics, folder.rollouts)):
        raise InputError(f"{root}: no run has left config.yaml, metrics.jsonl or rollouts/ here")
    missing: list[str] = []
    cfg = _read_config(folder, missing)
    metrics = _read_metrics(folder, missing)
    steps = _steps(folder, missing)
    alarms, remarks = _read_log(folder, missing)
    return RunRecord(
        name=name,
        folder=folder,
        cfg=cfg,
        metrics=tuple(metrics),
        steps=steps,
        state=_state(folder, cfg, metrics),
        alarms=tuple(alarms),
        remarks=tuple(remarks[-MOST_LINES:]),
        missing=tuple(missing),
    )


def _read_config(folder: RunFolder, missing: list[str]) -> Config | None:
    try:
        return load_config(folder.config)
    except InputError as error:
        missing.append(f"{error}; what depends on the config is not shown")
        return None


def _read_metrics(folder: RunFolder, missing: list[str]) -> list[dict[str, float]]:
    """Of steps that were done twice, the later row."""
    try:
        lines = folder.metrics.read_bytes().split(b"\n")
    except OSError as error:
        missing.append(f"{folder.metrics}: {error.strerror}; there are no curves of this run")
        return []
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
            rows[step] = {n: float(v) for n, v in row.items() if _is_finite(v)}
        except (ValueError, KeyError, TypeError):
            is_last = number == len(lines)
            why = "is cut off" if is_last else "is no row of metrics"
            missing.append(f"{folder.metrics}: line {number} {why} and is left out")
    return [rows[step] for step in sorted(rows)]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _steps(folder: RunFolder, missing: list[str]) -> tuple[int, ...]:
    if not folder.rollouts.is_dir():
        missing.append(f"{folder.rollouts}: is not there; no rollouts can be shown")
        return ()
    parts = [PART.fullmatch(path.name) for path in folder.rollouts.iterdir()]
    return tuple(sorted({int(part[1]) for part in parts if part and not part[4]}))


def _read_log(folder: RunFolder, missing: list[str]) -> tuple[list[str], list[str]]:
    """Why the run stopped, and all that is not the line of a step."""
    try:
        lines = folder.log.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        missing.append(f"{folder.log}: {error.strerror}; no alarms and remarks are shown")
        return [], []
    said = [line for line in lines if line.strip() and not PROGRESS.fullmatch(line)]
    alarms = [line for line in said if line.startswith("stopped ")]
    return alarms, [line for line in said if line not in alarms]


def _state(folder: RunFolder, cfg: Config | None, metrics: list[dict[str, float]]) -> str:
    if folder.is_finished:
        return "finished"
    try:
        folder.check_idle()
    except InputError:
        return "runs"
    done = int(metrics[-1]["step"]) + 1 if metrics else 0
    return f"stopped after {done} of {cfg.num_steps if cfg else 'an unknown number of'} steps"

"""Run folders for tests of the report, as a run leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.config_file import dump_config
from megatron_srpo.journal import Journal
from megatron_srpo.types import Group
from tests.unit.builders import NAMED, collect, config, prompt, scripted


def write_run(
    root: Path,
    steps: Sequence[Sequence[Group]] = (),
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    log: str = "",
    **changes: Any,
) -> Path:
    """`changes` are the config's; it is the run of a tokenizer that is nowhere."""
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(dump_config(config(run_dir=str(root), **changes)))
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (root / "log.txt").write_text(log)
    (root / "rollouts").mkdir()
    for step, groups in enumerate(steps):
        Journal(folder=root / "rollouts", replica=0, num_replicas=1).write(step, groups)
    return root


def named(id: str = "p", *, step: int = 0) -> list[Group]:
    """A prompt whose second rollout is reset to before its second thought; see `NAMED`."""
    answers = {key.replace("0/p/", f"{step}/{id}/", 1): text for key, text in NAMED.items()}
    return collect(scripted(answers), prompt(id=id), step=step)

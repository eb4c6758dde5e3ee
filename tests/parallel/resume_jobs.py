"""Whole runs that are stopped and started again, as the command line runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_srpo import train
from megatron_srpo.assembly import Run, assemble
from megatron_srpo.config_file import load_config
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.inputs import read_inputs
from megatron_srpo.types import AlarmError, Completion, Request


def started(
    mesh: Mesh, config: Path, overrides: Sequence[str], stop_at: int | None = None
) -> tuple[str, Counter[str]]:
    """(the alarm, how many sequences were generated for what)

    `stop_at`: the step whose update is lost; its rollouts are in the journal.
    """
    layout = [
        f"parallel.tp={mesh.tp_size}", f"parallel.pp={mesh.pp_size}",
        f"rollout.tp={mesh.world_size // mesh.num_replicas}",
    ]  # fmt: skip
    cfg = load_config(config, [*layout, *overrides])
    inputs = read_inputs(cfg, num_processes=mesh.world_size)
    runs: list[Run] = []
    asked: Counter[str] = Counter()
    generate, check = VllmGenerator.generate, train.check_mismatch

    def assembled(*arguments: Any) -> Run:
        runs.append(assemble(*arguments))
        return runs[0]

    def counted(self: VllmGenerator, requests: Sequence[Request]) -> Iterator[Completion]:
        asked.update(request.purpose for request in requests)
        return generate(self, requests)

    def checked(stats: dict[str, float], run: Run, step: int) -> None:
        check(stats, run, step)
        if step == stop_at:
            raise AlarmError(f"stopped in step {step}")

    with (
        mock.patch.object(train, "assemble", assembled),
        mock.patch.object(train, "check_mismatch", checked),
        mock.patch.object(VllmGenerator, "generate", counted),
    ):
        try:
            train.train_on(mesh, cfg, inputs)
        except AlarmError as alarm:
            mesh.gather(None)
            runs[0].engine.close()
            return str(alarm), asked
    return "", asked

"""Warm start from demonstrations: the same learner, cross entropy instead of rewards.

prompt and response pairs -> samples with advantage 1 -> Hugging Face folder
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_srpo.claim import claimed
from megatron_srpo.config import Config
from megatron_srpo.config_sections import LossConfig, SftConfig
from megatron_srpo.data import EpochOrder, demonstration_sample
from megatron_srpo.engines.megatron.backend import backend_of
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh, destroy_mesh
from megatron_srpo.exchange import exchange
from megatron_srpo.export import save_hf
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.preflight import checked_mesh
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.seeding import counter_seed
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.telemetry import Telemetry
from megatron_srpo.types import Tokens

Demonstrations = Sequence[tuple[Tokens, Tokens]]


def sft(cfg: Config, demonstrations: Demonstrations) -> None:
    """Train `sft.model` on the demonstrations; writes `<sft.run_dir>/hf`."""
    assert cfg.sft is not None, "checked when the demonstrations were read"
    folder = RunFolder(cfg.sft.run_dir)
    mesh = checked_mesh(cfg.parallel, run_dir=cfg.sft.run_dir)

    def begin() -> None:
        folder.check_free()
        folder.create(cfg)

    with claimed(folder, begin, rank=mesh.rank, gather=mesh.gather):
        _warm_start(cfg, cfg.sft, folder, demonstrations, mesh)
    destroy_mesh()


def _warm_start(
    cfg: Config, warm: SftConfig, folder: RunFolder, demonstrations: Demonstrations, mesh: Mesh
) -> None:
    backend = backend_of(cfg)
    learner = MegatronLearner(
        warm.model,
        mesh,
        dtype=getattr(torch, cfg.dtype),
        temperature=1.0,
        optimizer=warm.optimizer,
        loss=LossConfig(),
        num_steps=warm.num_steps,
        kernels=cfg.kernels,
        backend=backend,
    )
    layout = PackLayout.on(
        mesh, max_tokens=cfg.micro_batch_tokens, fp8_multiple=cfg.fp8.token_multiple
    )
    stopwatch = Stopwatch()
    order = EpochOrder(len(demonstrations), counter_seed(cfg.seed, "sft"))
    with Telemetry(
        folder if mesh.rank == 0 else None,
        cfg.log,
        name="sft",
        num_steps=warm.num_steps,
        stopwatch=stopwatch,
    ) as telemetry:
        for note in backend.notes:
            telemetry.say(note)
        for step in range(warm.num_steps):
            mine = _share(step, warm.batch_size, mesh.rank, mesh.world_size)
            samples = [
                demonstration_sample(
                    str(order[i]), *demonstrations[order[i]], weight=1.0, count=1.0
                )
                for i in mine
            ]
            batch = exchange(samples, mesh, layout=layout)
            with stopwatch.phase("train"):
                stats = learner.update([batch])
            metrics = {"loss": stats["loss"], "grad_norm": stats["grad_norm"], **stopwatch.take()}
            telemetry.log(step, metrics, f"loss {stats['loss']:.3f}")
        save_hf(folder.hf, learner, mesh, like=warm.model)
        telemetry.say(f"warm-started policy: {folder.hf}")


def _share(step: int, num_samples: int, rank: int, num_ranks: int) -> range:
    """Positions of a rank's demonstrations, of a step's `num_samples`."""
    return range(step * num_samples + rank, (step + 1) * num_samples, num_ranks)

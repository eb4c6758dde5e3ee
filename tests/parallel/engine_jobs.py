"""Jobs with a rollout engine: learner and vLLM in the same processes, as in a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_srpo.assembly import assemble
from megatron_srpo.colocation import Colocation
from megatron_srpo.config_file import load_config
from megatron_srpo.config_sections import RolloutConfig
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.exchange import exchange
from megatron_srpo.hf_folder import tensor_shapes
from megatron_srpo.inputs import read_inputs
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.telemetry import Telemetry
from megatron_srpo.train import loop
from megatron_srpo.types import AlarmError, Request
from megatron_srpo.weight_sync import WeightSync
from tests.parallel.jobs import build_learner, own_share
from tests.tiny import random_samples

T = TypeVar("T")
PROMPTS = tuple(f"prompt{index}" for index in range(6))


def with_engine(mesh: Mesh, policy: Path, work: Callable[[VllmGenerator], T]) -> T:
    """The command line's order: the engine closes when all have done, before its groups go."""
    cfg = RolloutConfig(max_model_len=160, tp=mesh.world_size // mesh.num_replicas)
    engine = VllmGenerator(policy, cfg, dtype="float32")
    try:
        return work(engine)
    finally:
        mesh.gather(None)
        engine.close()


def requests(ids: Sequence[str]) -> list[Request]:
    return [
        Request(
            id=id,
            purpose="base",
            context=np.random.default_rng(len(id) + ord(id[-1])).integers(2, 16, 20, np.int32),
            max_tokens=24,
            temperature=0.8,
            seed=ord(id[-1]),
        )
        for id in ids
    ]


def synced(mesh: Mesh, policy: Path, stale_on: int | None) -> dict[str, Any]:
    """Three updates, each synced; then every replica's completions of its share of the prompts."""
    learner = build_learner(policy, mesh)

    def work(engine: VllmGenerator) -> dict[str, Any]:
        if mesh.rank == stale_on:
            engine._llm.reset_prefix_cache = lambda: True  # type: ignore[method-assign]
        weight_sync = WeightSync(
            learner=learner,
            engine=engine,
            shapes=tensor_shapes(policy),
            probe=np.arange(80, dtype=np.int32) % 14 + 2,
            temperature=0.8,
            max_logprob_diff=1e-5,
            gather=mesh.gather,
        )
        found: dict[str, Any] = {"probe": [], "alarm": None}
        try:
            for step in range(3):
                samples = own_share(random_samples(5, seed=step), mesh)
                learner.update(
                    [exchange(samples, mesh, layout=PackLayout.on(mesh, max_tokens=100))]
                )
                weight_sync.cache_probe()
                found["probe"].append(weight_sync(version=step + 1)["sync/probe_logprob_abs_max"])
        except AlarmError as alarm:
            return found | {"alarm": str(alarm)}
        mine = requests(PROMPTS[mesh.replica :: mesh.num_replicas])
        completions = list(engine.generate(mine))
        contexts = {request.id: request.context for request in mine}
        whole = [np.concatenate([contexts[c.request_id], c.token_ids]) for c in completions]
        # Ranks of one copy of the policy may be of different replicas: all score all answers.
        answers = mesh.gather([(w, c.logprobs) for w, c in zip(whole, completions, strict=True)])
        asked = [answer for share in answers for answer in share]
        right = learner.logprobs([tokens for tokens, _ in asked], temperature=0.8)
        found["off"] = max(
            float(np.abs(judged[-len(said) :] - said).max())
            for judged, (_, said) in zip(right, asked, strict=True)
        )
        found["tokens"] = {c.request_id: c.token_ids.tolist() for c in completions}
        return found | {"replica": mesh.replica}

    return with_engine(mesh, policy, work)


def trained(mesh: Mesh, config: Path, run_dir: Path, replay: Path | None) -> dict[str, Any]:
    """A whole run, its loop and its evaluation; rank 0's metrics of each step."""
    overrides = [
        f"run_dir={run_dir}", f"parallel.tp={mesh.tp_size}", f"parallel.pp={mesh.pp_size}",
        f"rollout.tp={mesh.world_size // mesh.num_replicas}",
    ]  # fmt: skip
    cfg = load_config(config, overrides)
    inputs = read_inputs(cfg, num_processes=mesh.world_size, replay=replay)
    run = assemble(cfg, inputs, mesh, replay, Colocation.on(mesh))
    if mesh.rank == 0:
        RunFolder(run_dir).create(cfg)
    mesh.gather(None)
    folder = RunFolder(run_dir) if mesh.rank == 0 else None
    try:
        with Telemetry(
            folder, cfg.log, name="", num_steps=cfg.num_steps, stopwatch=run.stopwatch
        ) as telemetry:
            loop(run, telemetry)
        return {name: tensor.clone() for name, tensor in run.learner.export()}
    finally:
        mesh.gather(None)
        run.engine.close()

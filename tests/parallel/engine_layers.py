"""Transformer Engine's layers, where a stand-in computes what they would, beside local ones.

torchrun ... -m tests.parallel.engine_layers FOLDER, with `stand_in` on PYTHONPATH, on one process
or on two that are tensor parallel. What it finds is one line of JSON, of the first rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import nested_values

from megatron_srpo.checkpoint_folder import megatron_part
from megatron_srpo.config_precision import Fp8Config
from megatron_srpo.config_sections import OptimizerConfig, ParallelConfig
from megatron_srpo.engines.megatron.backend import LOCAL, Backend
from megatron_srpo.engines.megatron.checkpoint import (
    CheckpointWriter,
    load_checkpoint,
    sharded_state,
)
from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh, build_mesh, destroy_mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.names import heads_of
from megatron_srpo.engines.megatron.weights import (
    all_shards,
    full_tensors,
    load_hf,
    local_parameters,
)
from megatron_srpo.hf_folder import read_tensors
from megatron_srpo.pack_layout import PackLayout
from tests.parallel import jobs
from tests.tiny import FAMILIES, random_samples, write_policy

NO_FP8 = Fp8Config()
ENGINE = Backend(layers="transformer_engine", fp8=NO_FP8)
SHARED = ("qwen2", "olmo3", "qwen3_moe")
"""Families on two processes, and whose checkpoints are loaded: biases, norms over all heads,
experts."""
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-4, clip_grad=0.05)


def learner_of(policy: Path, mesh: Mesh, backend: Backend, dtype: torch.dtype) -> MegatronLearner:
    return MegatronLearner(
        policy,
        mesh,
        dtype=dtype,
        temperature=1.0,
        optimizer=OPTIMIZER,
        loss=jobs.REINFORCE,
        num_steps=10,
        backend=backend,
    )


def off(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Largest difference, of the largest element."""
    assert ones.keys() == others.keys()
    return max(
        float((one - others[name]).abs().max() / one.abs().max()) for name, one in ones.items()
    )


def keys(learner: MegatronLearner) -> dict[str, list[int]]:
    """Of the tensors in a checkpoint, with their shapes."""
    entries: Iterable[Any] = nested_values(
        {**sharded_state(learner, is_loading=False), "schedule": {}}
    )
    built: list[Any] = []
    for entry in entries:
        if isinstance(entry, ShardedObject) or not hasattr(entry, "key"):
            continue
        built += nested_values(entry.build()) if hasattr(entry, "build") else [entry]
    return {entry.key: list(entry.global_shape) for entry in built}


def beside_local(policy: Path, mesh: Mesh, folder: Path) -> dict[str, Any]:
    """How far a learner is from one with local layers: in what it computes, in what it writes."""
    local = learner_of(policy, mesh, LOCAL, torch.float32)
    engine = learner_of(policy, mesh, ENGINE, torch.float32)
    stored = dict(read_tensors(policy))
    loaded = {name: tensor for name, tensor in engine.export() if name in stored}
    gradients = [jobs.gradient(each, mesh, 100) for each in (local, engine)]
    found: dict[str, Any] = {
        "weights in and out": all(torch.equal(loaded[n], stored[n]) for n in stored),
        "loss": abs(gradients[0][0]["loss"] - gradients[1][0]["loss"]),
        "gradient norm": abs(local.optimizer.step() / engine.optimizer.step() - 1),
        "gradients": off(gradients[0][1], gradients[1][1]) if mesh.rank == 0 else 0.0,
        "keys": keys(local) == keys(engine),
    }
    ways = {"local to engine": (local, engine), "engine to local": (engine, local)}
    for name, (writer, reader) in ways.items() if policy.name in SHARED else ():
        writer.update([jobs.shared(random_samples(5, seed=3), mesh)])
        saved = jobs.exported(writer)
        checkpoint = megatron_part(folder / name)
        if mesh.rank == 0:
            checkpoint.mkdir(parents=True)
        mesh.gather(None)
        CheckpointWriter(writer, asynchronous=False, gather=mesh.gather).begin(checkpoint)
        load_checkpoint(reader, checkpoint)
        found[name] = all(torch.equal(t, saved[n]) for n, t in reader.export())
        for each in (local, engine):
            each.update([jobs.shared(random_samples(5, seed=4), mesh)])
        found[f"{name}, goes on"] = off(jobs.exported(writer), jobs.exported(reader))
    return found


def in_fp8(policy: Path, mesh: Mesh, recipe: Any, folder: Path) -> dict[str, Any]:
    """A step with FP8, its log-probs, and what a checkpoint keeps of its scales."""
    fp8 = Fp8Config(recipe=recipe, first_last_bf16=0 if recipe == "delayed" else 1)
    backend = Backend(layers="transformer_engine", fp8=fp8)
    learner = learner_of(policy, mesh, backend, torch.bfloat16)
    again = learner_of(policy, mesh, backend, torch.bfloat16)
    layout = PackLayout.on(mesh, max_tokens=100, fp8_multiple=fp8.token_multiple)
    samples = jobs.own_share(random_samples(5, seed=3), mesh)
    stats = learner.update([jobs.exchange(samples, mesh, layout=layout)])
    logprobs = learner.logprobs([s.token_ids for s in samples[:2]], temperature=1.0)
    checkpoint = megatron_part(folder / recipe)
    if mesh.rank == 0:
        checkpoint.mkdir(parents=True)
    mesh.gather(None)
    CheckpointWriter(learner, asynchronous=False, gather=mesh.gather).begin(checkpoint)
    load_checkpoint(again, checkpoint)
    config: Any = learner.modules[0].config
    return {
        "loss": stats["loss"],
        "dtypes": sorted({str(each.dtype) for each in logprobs}),
        "config": [config.fp8, config.fp8_recipe, config.fp8_amax_history_len],
        "layers with scales": scaled(learner),
        "scales are kept": scales(learner) == scales(again),
    }


def scales(learner: MegatronLearner) -> dict[str, float]:
    """Of all layers but experts, by name."""
    return {
        name: module.largest
        for name, module in learner.modules[0].named_modules()
        if getattr(module, "largest", None) is not None and ".experts." not in name
    }


def scaled(learner: MegatronLearner) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in scales(learner)})


def held_in_fp8(policy: Path, mesh: Mesh) -> dict[str, Any]:
    """A folder's weights, where layers hold them in FP8."""
    fp8 = Fp8Config(recipe="tensorwise", param_gather=True)
    backend = Backend(layers="transformer_engine", fp8=fp8)
    chunks = build_chunks(policy, mesh, torch.bfloat16, backend)
    load_hf(chunks, policy, mesh)
    local = local_parameters(chunks, mesh)
    tied = chunks[0].share_embeddings_and_output_weights
    shards = all_shards(chunks, mesh)
    family, heads = family_of(policy), heads_of(policy)
    out = dict(full_tensors(family, heads, mesh, shards, local, tied=tied))
    masters = {n: getattr(p, "high_precision", p.detach()) for n, p in local.items()}
    exact = dict(full_tensors(family, heads, mesh, shards, masters, tied=tied))
    stored = {n: t.bfloat16() for n, t in read_tensors(policy)}
    return {
        "masters": all(torch.equal(exact[n], t) for n, t in stored.items()),
        "rounded": sum(not torch.equal(out[n], t) for n, t in stored.items()),
        "far": max(float((out[n] - t).abs().max() / t.abs().max()) for n, t in stored.items()),
        "plain": all(type(t) is torch.Tensor and t.dtype == torch.bfloat16 for t in out.values()),
    }


def main(folder: Path) -> None:
    num = int(os.environ["WORLD_SIZE"])
    mesh = build_mesh(ParallelConfig(tp=num))
    found: dict[str, Any] = {}
    for family in FAMILIES if num == 1 else SHARED:
        policy = folder / family
        if mesh.rank == 0:
            num_layers = 4 if family in ("olmo3", "qwen3_moe") else 2
            tied = family == "qwen2"
            write_policy(policy, seed=7, family=family, tied=tied, num_layers=num_layers)
        mesh.gather(None)
        found[family] = beside_local(policy, mesh, folder / f"{family} checkpoints")
    if num == 1:
        for recipe in ("delayed", "blockwise"):
            found[recipe] = in_fp8(folder / "qwen3_moe", mesh, recipe, folder / "fp8")
        found["held"] = held_in_fp8(folder / "qwen3", mesh)
    if mesh.rank == 0:
        print(json.dumps(found), flush=True)
    destroy_mesh()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Trainer and rollout engine as a run has them, of a config; what a part of the check needs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.assembly import build_engines, build_learner
from megatron_srpo.colocation import Colocation
from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh, build_mesh
from megatron_srpo.engines.megatron.weights import local_parameters
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.exchange import exchange
from megatron_srpo.hf_folder import read_config, tensor_shapes
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.stopping import StopPoints
from megatron_srpo.types import Batch, Request, Sample
from megatron_srpo.weight_sync import WeightSync
from tests.e2e.small_run import write_small_run

GIB = 2**30


def used_gib() -> float:
    """Of the GPU, by its driver."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def needed_gib() -> float:
    """The same, without what torch's allocator only keeps for later."""
    torch.cuda.empty_cache()
    return used_gib()


def config_of(model: Path, *overrides: str) -> Config:
    """A run on that model, which nobody begins. Raises `InputError` for what this build lacks."""
    folder = Path(tempfile.mkdtemp())
    return load_config(write_small_run(folder), [f"model={model}", *overrides])


def learner_of(cfg: Config, mesh: Mesh) -> MegatronLearner:
    """The trainer alone."""
    return build_learner(cfg, mesh, StopPoints())


def batch_of(samples: Sequence[Sample], cfg: Config, mesh: Mesh) -> Batch:
    layout = PackLayout.on(
        mesh, max_tokens=cfg.micro_batch_tokens, fp8_multiple=cfg.fp8.token_multiple
    )
    return exchange(samples, mesh, layout=layout)


def gradients_of(learner: MegatronLearner, mesh: Mesh) -> dict[str, Tensor]:
    """Of one process, after `backward`: by Hugging Face name, in float64 on the host."""
    parameters = local_parameters(learner.modules, mesh)
    full = learner.gathered(
        {name: parameter.main_grad for name, parameter in parameters.items()}  # type: ignore[attr-defined]
    )
    return {name: tensor.double().cpu() for name, tensor in full}


def off(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Norm of the difference of all, relative to the norm of what is right."""
    wrong = sum(float((found[name] - tensor).square().sum()) for name, tensor in right.items())
    return (wrong / sum(float(tensor.square().sum()) for tensor in right.values())) ** 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Both engines, one GPU."""

    cfg: Config
    mesh: Mesh
    gpu: Colocation
    learner: MegatronLearner
    engine: VllmGenerator
    sync: WeightSync

    @classmethod
    def build(cls, cfg: Config) -> World:
        mesh = build_mesh()
        gpu = Colocation.on(mesh)
        learner, engine = build_engines(cfg, mesh, gpu)
        vocabulary = read_config(cfg.model)["vocab_size"]
        sync = WeightSync(
            learner=learner,
            engine=engine,
            shapes=tensor_shapes(cfg.model),
            probe=np.random.default_rng(0).integers(2, vocabulary, 80).astype(np.int32),
            temperature=cfg.rollout.temperature,
            max_logprob_diff=cfg.max_logprob_diff,
            gather=mesh.gather,
            turns=gpu.turns,
        )
        return cls(cfg=cfg, mesh=mesh, gpu=gpu, learner=learner, engine=engine, sync=sync)

    def requests(self, num: int, *, prompt: int, response: int, step: int) -> list[Request]:
        """Random prompts."""
        rng = np.random.default_rng(step)
        vocabulary = read_config(self.cfg.model)["vocab_size"]
        return [
            Request(
                id=f"{step}/{index}",
                purpose="base",
                context=rng.integers(2, vocabulary, prompt).astype(np.int32),
                max_tokens=response,
                temperature=self.cfg.rollout.temperature,
                seed=step * 100_000 + index,
            )
            for index in range(num)
        ]

    def rollouts(self, requests: Sequence[Request]) -> list[Sample]:
        """Trained as they were sampled, with advantages of either sign."""
        contexts = {request.id: request.context for request in requests}
        samples: list[Sample] = []
        for index, answer in enumerate(self.engine.generate(requests)):
            context = contexts[answer.request_id]
            nothing = np.zeros(len(context), np.float32)
            own = np.ones(len(answer.token_ids), np.float32)
            samples.append(
                Sample(
                    id=answer.request_id,
                    token_ids=np.concatenate([context, answer.token_ids]).astype(np.int32),
                    loss_weight=np.concatenate([nothing, own / np.float32(len(own))]),
                    advantage=np.concatenate([nothing, own * np.float32((-1) ** index)]),
                    logprob=np.concatenate([nothing, answer.logprobs]),
                    count=1.0,
                )
            )
        return samples

    def step(self, requests: Sequence[Request], version: int) -> dict[str, float]:
        """Sync, generate, train: what was measured."""
        with self.gpu.syncing():
            found = self.sync(version=version)
        with self.gpu.generating(), self.gpu.stopwatch.phase("generate"):
            samples = self.rollouts(requests)
        batch = batch_of(samples, self.cfg, self.mesh)
        with self.gpu.training():
            found |= self.sync.verdict()
            stats = self.learner.update([batch])
        tokens = sum(len(sample.token_ids) for sample in samples)
        generated = tokens - sum(len(request.context) for request in requests)
        counts = {"tokens/generated": float(generated), "tokens/all": float(tokens)}
        return found | stats | counts | self.gpu.stopwatch.take()

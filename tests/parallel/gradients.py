"""A batch's loss and gradients under any number of processes, by Hugging Face name.

    torchrun --nproc-per-node N -m tests.parallel.gradients POLICY OUT [--max-tokens K] [--shuffle]

The samples start out on whichever rank, as rollouts do; rank 0 writes what all ranks found.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_srpo.config import LossConfig, OptimizerConfig
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh, build_mesh, destroy_mesh
from megatron_srpo.engines.megatron.names import split
from megatron_srpo.environment import set_environment
from megatron_srpo.exchange import exchange
from tests.tiny import random_samples

NUM_SAMPLES = 13
TEMPERATURE = 0.8
REINFORCE = LossConfig()


def build_learner(
    policy: Path, mesh: Mesh, *, loss: LossConfig = REINFORCE, warmup_steps: int = 0
) -> MegatronLearner:
    return MegatronLearner(
        policy,
        mesh,
        dtype=torch.float32,
        temperature=TEMPERATURE,
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4, clip_grad=0.05, warmup_steps=warmup_steps),
        loss=loss,
        num_steps=10,
    )


def hf_gradients(learner: MegatronLearner, mesh: Mesh) -> dict[str, torch.Tensor]:
    """The reduced gradient of every parameter; each rank holds a shard of the buffer."""
    names = {parameter: name for name, parameter in learner.module.named_parameters()}
    config, family = learner.module.config, learner._family
    found: dict[str, torch.Tensor] = {}
    for buffer in learner.model.buffers:
        for bucket in buffer.buckets:
            shards = [torch.empty_like(s) for s in bucket.grad_data.chunk(mesh.dp_size)]
            mine = bucket.grad_data.chunk(mesh.dp_size)[mesh.dp_rank].contiguous()
            dist.all_gather(shards, mine, group=mesh.dp_group)
            bucket.grad_data.copy_(torch.cat(shards))
        for parameter, (start, end, _) in buffer.param_index_map.items():
            layout, hf_names = family.rule(names[parameter])
            gradient = buffer.grad_data[start:end].view(parameter.shape).clone()
            heads_per_group = config.num_attention_heads // config.num_query_groups
            parts = split(layout, gradient, config.num_query_groups, heads_per_group)
            found |= dict(zip(hf_names, parts, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("policy", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-tokens", type=int, default=100_000)
    parser.add_argument("--shuffle", action="store_true")
    arguments = parser.parse_args()
    set_environment()
    mesh = build_mesh()
    learner = build_learner(arguments.policy, mesh)
    samples = random_samples(NUM_SAMPLES, seed=1)
    if arguments.shuffle:
        random.Random(2).shuffle(samples)
    batch = exchange(samples[mesh.rank :: mesh.world_size], mesh, max_tokens=arguments.max_tokens)
    stats = learner.backward(batch)
    gradients = hf_gradients(learner, mesh)
    if mesh.rank == 0:
        torch.save({"stats": stats, "gradients": gradients}, arguments.out)
    destroy_mesh()


if __name__ == "__main__":
    main()

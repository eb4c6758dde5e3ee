"""What the processes of the pool do: jobs on a mesh, and how tests look into a learner."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_srpo.batching import mini_batches
from megatron_srpo.config_sections import KernelConfig, LossConfig, OptimizerConfig
from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.weights import load_hf, local_parameters
from megatron_srpo.exchange import exchange
from megatron_srpo.kernels.linear_logprob import linear_logprob
from megatron_srpo.kernels.linear_policy_loss import linear_policy_loss
from megatron_srpo.kernels.logprob_stats import logprob_stats
from megatron_srpo.loss import to_metrics
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.preflight import check_all_reduce
from megatron_srpo.protocols import Generator
from megatron_srpo.replica import LeaderRule
from megatron_srpo.types import (
    AlarmError,
    Batch,
    Prompt,
    Request,
    Reset,
    Rollout,
    Sample,
    Tokens,
)
from tests.tiny import random_samples
from tests.unit.loss_cases import in_fp32
from tests.unit.test_loss import drawn as drawn_tokens

NUM_SAMPLES = 13
TEMPERATURE = 0.8
REINFORCE = LossConfig()
PPO = LossConfig(
    surrogate="ppo", kl_coef=0.1, importance="token_truncate", importance_cap=1.1,
    updates_per_batch=2,
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


def build_learner(
    policy: Path,
    mesh: Mesh,
    *,
    loss: LossConfig = REINFORCE,
    warmup_steps: int = 0,
    kernels: KernelConfig = KernelConfig(),
) -> MegatronLearner:
    return MegatronLearner(
        policy,
        mesh,
        dtype=torch.float32,
        temperature=TEMPERATURE,
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4, clip_grad=0.05, warmup_steps=warmup_steps),
        loss=loss,
        num_steps=10,
        kernels=kernels,
    )


def hf_gradients(learner: MegatronLearner, mesh: Mesh) -> Tensors:
    """The reduced gradient of every parameter; each data parallel rank holds part of a buffer."""
    gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
    for model in learner.models:
        for buffer in model.buffers + model.expert_parallel_buffers:
            group: Any = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = [torch.empty_like(s) for s in bucket.grad_data.chunk(group.size())]
                mine = bucket.grad_data.chunk(group.size())[group.rank()].contiguous()
                dist.all_gather(shards, mine, group=group)
                bucket.grad_data.copy_(torch.cat(shards))
            for parameter, (start, end, _) in buffer.param_index_map.items():
                gradients[parameter] = buffer.grad_data[start:end].view(parameter.shape)
    parameters = local_parameters(learner.modules, mesh)
    full = learner.gathered({name: gradients[p] for name, p in parameters.items()})
    return {name: tensor.clone() for name, tensor in full}


def own_share(samples: Sequence[Sample], mesh: Mesh) -> Sequence[Sample]:
    """As after rollouts: every rank of a replica holds what its replica made."""
    return samples[mesh.replica :: mesh.num_replicas]


def sequences() -> list[Tokens]:
    return [sample.token_ids for sample in random_samples(3, seed=5)]


def shared(samples: Sequence[Sample], mesh: Mesh, *, max_tokens: int = 100) -> Batch:
    """This rank's batch of samples that all replicas made together."""
    layout = PackLayout.on(mesh, max_tokens=max_tokens)
    return exchange(own_share(samples, mesh), mesh, layout=layout)


def gradient(
    learner: MegatronLearner, mesh: Mesh, max_tokens: int
) -> tuple[dict[str, float], Tensors]:
    samples = random_samples(NUM_SAMPLES, seed=1)
    stats = learner.backward(shared(samples, mesh, max_tokens=max_tokens))
    gradients = hf_gradients(learner, mesh)
    return stats, gradients if mesh.rank == 0 else {}


def three_steps(learner: MegatronLearner, mesh: Mesh) -> tuple[list[dict[str, float]], Tensors]:
    stats = [learner.update([shared(random_samples(5, seed=step), mesh)]) for step in range(3)]
    parameters = exported(learner)
    return stats, parameters if mesh.rank == 0 else {}


def updated(mesh: Mesh, policy: Path) -> tuple[dict[str, float], Tensors]:
    """Two updates in one step, with every part of the loss."""
    learner = build_learner(policy, mesh, loss=PPO)
    samples = [replace(s, turn=i % 2) for i, s in enumerate(random_samples(10, seed=4))]
    batches = [
        exchange(
            own_share(turn, mesh),
            mesh,
            layout=PackLayout.on(mesh, max_tokens=100),
            with_silent=True,
        )
        for turn in mini_batches(samples, PPO.updates_per_batch)
    ]
    stats = learner.update(batches)
    return stats, {name: tensor.clone() for name, tensor in learner.export()}


def exported(learner: MegatronLearner) -> Tensors:
    return {name: tensor.clone() for name, tensor in learner.export()}


def logprobs(learner: MegatronLearner, mesh: Mesh) -> list[tuple[Tokens, np.ndarray]]:
    """Each copy of the policy is asked about other sequences."""
    sequences = [s.token_ids for s in random_samples(3, seed=5 + mesh.dp_rank)]
    found = learner.logprobs(sequences, temperature=TEMPERATURE)
    return list(zip(sequences, found, strict=True))


def not_a_number(learner: MegatronLearner, mesh: Mesh) -> str:
    """The message of the alarm, on every rank; the learner is of no use after this."""
    with torch.no_grad():
        for name, parameter in local_parameters(learner.modules, mesh).items():
            if name == "decoder.final_layernorm.weight":
                parameter[0] = float("nan")
    try:
        learner.update([shared(random_samples(4, seed=9), mesh)])
    except AlarmError as alarm:
        return str(alarm)
    return "no alarm"


def exchanged(mesh: Mesh) -> tuple[int, list[str], float]:
    """(slot, ids in the order of micro-batches, denominator)"""
    samples = own_share(random_samples(NUM_SAMPLES, seed=1), mesh)
    batch = exchange(samples, mesh, layout=PackLayout.on(mesh, max_tokens=100))
    ids = [id for micro_batch in batch.micro_batches for id in micro_batch.sample_ids]
    return mesh.dp_rank, ids, batch.denominator


def silent_samples(mesh: Mesh, with_silent: bool) -> tuple[int, float]:
    """Of six samples: three with an advantage, two with a weight only, one with nothing."""
    nothing, samples = np.zeros(1, np.float32), random_samples(6, seed=3)
    for index, sample in enumerate(samples):
        samples[index] = replace(
            sample,
            advantage=sample.advantage if index < 3 else sample.advantage * nothing,
            loss_weight=sample.loss_weight if index < 5 else sample.loss_weight * nothing,
        )
    batch = exchange(
        own_share(samples, mesh),
        mesh,
        layout=PackLayout.on(mesh, max_tokens=100),
        with_silent=with_silent,
    )
    return sum(len(m.sample_ids) for m in batch.micro_batches), batch.denominator


PROMPT = Prompt(id="p", text="", token_ids=np.zeros(1, np.int32), answer="")


def reset_by_rank(mesh: Mesh) -> tuple[int | None, int, list[str]]:
    """(thought that counts, how often this rank's rule was asked, what its engine was asked)

    The rule asks for other requests on every rank, and looks at the first answer only.
    """

    class Rule:
        asked = 0

        def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
            self.asked += 1
            for number in range(2):
                next(generator.generate([_request(f"{mesh.rank}/{number}/{i}") for i in range(3)]))
            return [Reset(seed_id="s", thought=mesh.rank, cause="rank")]

    rule, generator = Rule(), FakeGenerator(lambda context, rng: "")
    (reset,) = LeaderRule(rule=rule, mesh=mesh).choose([], generator)
    return reset.thought, rule.asked, [r.id for batch in generator.seen for r in batch]


def _request(id: str) -> Request:
    return Request(
        id=id, purpose="localize", context=PROMPT.token_ids, max_tokens=1, temperature=1.0, seed=0
    )


def rule_raises(mesh: Mesh, on_rank: int) -> str:
    """After one call of the engine."""

    class Rule:
        def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
            [*generator.generate([_request("r")])]
            if mesh.rank == on_rank:
                raise OSError("no such\nfile")
            return []

    try:
        LeaderRule(rule=Rule(), mesh=mesh).choose([], FakeGenerator(lambda context, rng: ""))
    except AlarmError as alarm:
        return str(alarm)
    return "no alarm"


def all_reduce_checked(mesh: Mesh, absent: int | None = None, off: int | None = None) -> str:
    """What a rank hears of it. `absent` does not come; what `off` gets is wrong."""
    if mesh.rank == absent:
        return "absent"
    if mesh.rank == off:
        mesh = replace(mesh, rank=7)  # what it adds is then 8
    try:
        check_all_reduce(mesh, timeout_s=1)
    except AlarmError as alarm:
        return str(alarm)
    return "right"


def fail_on_rank_1(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise AlarmError("rank 1 fails")
    mesh.gather(None)


def rank_sum(mesh: Mesh) -> int:
    return sum(mesh.gather(mesh.rank))


def on_layout(mesh: Mesh, policy: Path, max_tokens: tuple[int, ...]) -> dict[str, Any]:
    """All that the tests of a layout look at, in one job: in this order one learner serves all."""
    learner = build_learner(policy, mesh)
    return {
        "exported": exported(learner),
        "logits": learner._forward.logits(sequences()),
        "logprobs": logprobs(learner, mesh),
        "gradients": {tokens: gradient(learner, mesh, tokens) for tokens in max_tokens},
        "steps": three_steps(learner, mesh),
        "alarm": not_a_number(learner, mesh),
    }


def by_reference_head(mesh: Mesh, policy: Path) -> tuple[dict[str, float], Tensors]:
    """As `gradient`, by way of all logits."""
    return gradient(build_learner(policy, mesh, kernels=KernelConfig(head="reference")), mesh, 100)


def shared_vocabulary(mesh: Mesh, bounds: Sequence[int]) -> list[torch.Tensor]:
    """Log-prob, entropy and their gradients, in fp32; rank r holds tokens bounds[r] to [r + 1], and
    then a row that is none. Gradients of the hidden states are summed, of the weight put together.
    """
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=random).requires_grad_()
    weight = torch.randn(bounds[-1], 16, generator=random)
    targets = torch.randint(0, bounds[-1], (9,), generator=random)
    first, end = bounds[mesh.tp_rank : mesh.tp_rank + 2]
    own = torch.cat([weight[first:end], torch.full((1, 16), float("nan"))]).requires_grad_()
    found = linear_logprob(
        hidden, own, targets, temperature=0.8, first_id=first, num_real=end - first,
        group=mesh.tp_group, chunk=4,
    )  # fmt: skip
    factor = torch.arange(1.0, 10.0)
    by_hidden, by_weight = torch.autograd.grad(
        (found[0] * factor).sum() + (found[1] * factor.cos()).sum(), [hidden, own]
    )
    assert by_weight[-1].abs().max() == 0
    return [
        *(x.detach() for x in found),
        torch.stack(mesh.gather(by_hidden)).sum(0),
        torch.cat(mesh.gather(by_weight[:-1])),
    ]


def shared_logits(mesh: Mesh, bounds: Sequence[int]) -> list[torch.Tensor]:
    """As `shared_vocabulary`, of logits that are there, row 3 chosen twice."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(7, bounds[-1], generator=random)
    rows, targets = torch.tensor([3, 0, 6, 3]), torch.randint(0, bounds[-1], (4,), generator=random)
    first, end = bounds[mesh.tp_rank : mesh.tp_rank + 2]
    own = torch.cat([logits[:, first:end], torch.full((7, 1), float("nan"))], 1).requires_grad_()
    found = logprob_stats(
        own, rows, targets, temperature=0.8, first_id=first, num_real=end - first,
        group=mesh.tp_group,
    )  # fmt: skip
    factor = torch.arange(1.0, 5.0)
    (by_own,) = torch.autograd.grad((found[0] * factor).sum() + found[1].sum(), own)
    assert by_own[:, -1].abs().max() == 0
    return [*(x.detach() for x in found), torch.cat(mesh.gather(by_own[:, :-1]), 1)]


def shared_loss(mesh: Mesh, bounds: Sequence[int]) -> tuple[list[torch.Tensor], dict[str, float]]:
    """As `shared_vocabulary`, of a loss in one pass, in blocks of 4 rows; and its counters. All
    ranks hold equally many rows of the weight, the last ones of which are no tokens."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=random).requires_grad_()
    weight = torch.randn(bounds[-1], 16, generator=random)
    targets = torch.randint(0, bounds[-1], (9,), generator=random)
    _, tokens = drawn_tokens(0, [9])
    width = max(end - first for first, end in itertools.pairwise(bounds)) + 1
    first, end = bounds[mesh.tp_rank : mesh.tp_rank + 2]
    own = torch.full((width, 16), float("nan"))
    own[: end - first] = weight[first:end]
    own.requires_grad_()
    loss, counters, logprobs, entropies = linear_policy_loss(
        hidden, own, targets, in_fp32(tokens), PPO, denominator=3.0, temperature=4.0,
        first_id=first, num_real=end - first, group=mesh.tp_group, workspace=4 * width * 4, chunk=4,
    )  # fmt: skip
    by_hidden, by_weight = torch.autograd.grad(loss, [hidden, own])
    assert not by_weight[end - first :].any()
    tensors = [
        loss.detach(),
        logprobs,
        entropies,
        torch.stack(mesh.gather(by_hidden)).sum(0),
        torch.cat(mesh.gather(by_weight[: end - first])),
    ]
    return tensors, to_metrics(counters)


def shared_operations(
    mesh: Mesh, bounds: Sequence[int]
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """`shared_logits` and `shared_loss`, in one job."""
    tensors, metrics = shared_loss(mesh, bounds)
    return [*shared_logits(mesh, bounds), *tensors], metrics


LAYERS = {"stacked": False, "numbered": True}
"""How a checkpoint names the tensors of layers -> whether they may differ."""


def loads_and_saves(mesh: Mesh, hf: Path, converted: Path, out: Path) -> dict[str, bool]:
    """Of every parameter of this rank: Megatron's own loader gives what `load_hf` gives. Then its
    own saver, in both ways, the model and what a training run has besides."""
    (right,), (found,) = (build_chunks(hf, mesh, torch.float32) for _ in range(2))
    load_hf([right], hf, mesh)
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # Megatron would remember the group of this process's first job.
    metadata: dict[str, Any] = {"dp_cp_group": copies}
    state = found.sharded_state_dict(metadata=metadata)
    found.load_state_dict(dist_checkpointing.load(state, str(converted)))
    for layers, may_differ in LAYERS.items():
        moments = torch.full((4,), float("nan"))
        state = {
            "model": right.sharded_state_dict(
                metadata=metadata | {"non_homogeneous_layers": may_differ}
            ),
            "optimizer": {
                "exp_avg": ShardedTensor.from_rank_offsets(
                    "optimizer.exp_avg", moments, (0, mesh.rank, mesh.world_size)
                )
            },
            "step": 7,
        }
        folder = out / layers / "megatron"
        if mesh.rank == 0:
            folder.mkdir(parents=True)
        mesh.gather(None)
        dist_checkpointing.save(state, str(folder))
    loaded = dict(found.named_parameters())
    return {name: torch.equal(loaded[name], p) for name, p in right.named_parameters()}

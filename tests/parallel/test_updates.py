"""Several updates in a step: the learner against transformers and torch's AdamW in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_srpo.batching import mini_batches, pack
from megatron_srpo.config_sections import LossConfig
from megatron_srpo.data import demonstration_sample
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.reference import ParkedWeights
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.types import Batch, Sample
from tests.parallel.jobs import TEMPERATURE, build_learner
from tests.tiny import logprobs_of, random_samples, reference_logprobs

PPO = LossConfig(
    surrogate="ppo", clip_low=0.1, clip_high=0.2, kl_coef=0.1, importance="token_truncate",
    importance_cap=1.1, updates_per_batch=4,
)  # fmt: skip


def near_samples(policy: Path, *, seed: int) -> list[Sample]:
    """Ten rollouts that a slightly different policy sampled and a demonstration, by turns."""
    rng = np.random.default_rng(seed)
    rollouts: list[Sample] = []
    for turn, drawn in enumerate(random_samples(10, seed=seed)):
        known = reference_logprobs(policy, drawn.token_ids, temperature=TEMPERATURE)
        logprob = drawn.logprob.copy()
        logprob[1:] = known.detach().numpy() + 0.2 * rng.normal(size=len(known))
        rollouts.append(replace(drawn, logprob=logprob, turn=turn))
    prompt, response = rng.integers(2, 20, (2, 6)).astype(np.int32)
    return [*rollouts, demonstration_sample("shown", prompt, response, weight=0.1, count=0.0)]


PADDED = PackLayout.of(num_slots=1, max_tokens=100, cp=2, fp8_multiple=16)


def to_batches(samples: Sequence[Sample]) -> list[Batch]:
    """Two micro-batches in each, with padding in all sequences."""
    return [
        Batch(
            micro_batches=(pack(own[:2], PADDED), pack(own[2:], PADDED)),
            denominator=sum(s.count for s in own),
        )
        for own in mini_batches(samples, PPO.updates_per_batch)
    ]


def weights(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.export()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Float64:
    """The same updates written out: every sequence alone, no packing, no Megatron."""

    def __init__(self, policy: Path) -> None:
        self.model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float64)
        self.initial = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float64)
        self.adam = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-4, weight_decay=0
        )
        self.bites: list[float] = []
        self.k3: list[float] = []
        self.capped: list[float] = []

    @torch.no_grad()
    def old(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return {s.id: self.logprobs(self.model, s) for s in samples}

    def logprobs(self, model: Qwen2ForCausalLM, sample: Sample) -> torch.Tensor:
        return logprobs_of(model, sample.token_ids, temperature=TEMPERATURE)

    def loss(self, sample: Sample, old: torch.Tensor) -> torch.Tensor:
        current = self.logprobs(self.model, sample)
        initial = self.logprobs(self.initial, sample).detach()
        total = torch.zeros((), dtype=torch.float64)
        for t in range(len(current)):
            weight, advantage = float(sample.loss_weight[t + 1]), float(sample.advantage[t + 1])
            behaviour = float(sample.logprob[t + 1])
            if not weight:
                continue
            if np.isnan(behaviour):
                total = total - weight * advantage * current[t]
                continue
            ratio = (current[t] - old[t]).exp()
            clipped = ratio.clamp(1 - PPO.clip_low, 1 + PPO.clip_high)
            importance = float((old[t] - behaviour).exp())
            away = initial[t] - current[t]
            k3 = away.exp() - 1 - away
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            used = min(importance, PPO.importance_cap)
            total = total + weight * (PPO.kl_coef * k3 - used * surrogate)
            self.bites.append(float(surrogate < ratio * advantage))
            self.k3.append(float(k3.detach()))
            self.capped.append(float(importance > PPO.importance_cap))
        return total

    def update(self, samples: Sequence[Sample], lr: float) -> dict[str, float]:
        old = self.old(samples)
        self.adam.param_groups[0]["lr"] = lr
        self.bites, self.k3, self.capped = [], [], []
        losses, norms = [], []
        for own in mini_batches(samples, PPO.updates_per_batch):
            self.adam.zero_grad()
            loss = torch.stack([self.loss(s, old[s.id]) for s in own]).sum()
            loss = loss / sum(s.count for s in own)
            loss.backward()
            losses.append(float(loss.detach()))
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)))
            self.adam.step()
        return {
            "loss": float(np.mean(losses)),
            "grad_norm": max(norms),
            "loss/clip_fraction": float(np.mean(self.bites)),
            "loss/kl_reference": float(np.mean(self.k3)),
            "importance/capped_rate": float(np.mean(self.capped)),
        }


def test_four_clipped_updates_a_step_follow_torch(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh, loss=PPO, warmup_steps=2)
    right = Float64(policy)
    for step, lr in enumerate([5e-3, 1e-2, 1e-2]):
        samples = near_samples(policy, seed=step)
        found, expected = learner.update(to_batches(samples)), right.update(samples, lr)
        print("\n", {name: f"{found[name]:.6g} ({x:.6g})" for name, x in expected.items()})
        assert expected["loss/clip_fraction"] > 0.03, "the clip must bite for the test to see it"
        for name, number in expected.items():
            assert found[name] == pytest.approx(number, rel=2e-4, abs=1e-6), name
    exported = weights(learner)
    off = max(
        float((exported[n] - p.detach()).abs().max()) for n, p in right.model.named_parameters()
    )
    print(f"parameters off by {off:.1e} after 12 updates")
    assert off < 2e-5


def test_a_policy_that_has_not_moved_has_ratio_1_and_divergence_0_to_the_last_bit(
    policy: Path, mesh: Mesh
) -> None:
    learner = build_learner(policy, mesh, loss=PPO)
    first, *later = to_batches(near_samples(policy, seed=0))
    silent = tuple(replace(m, advantage=0 * m.advantage) for m in first.micro_batches)
    before = weights(learner)
    # Nothing asks the first update to go anywhere, so the second one meets its old policy.
    found = learner.update([replace(first, micro_batches=silent), later[0]])
    assert found["loss/ratio_max"] == 1.0
    assert found["loss/kl_reference"] == 0.0
    assert found["loss/clip_fraction"] == 0.0
    assert not same(before, weights(learner)), "the second update must have moved something"


def test_a_first_divergence_of_0_has_no_gradient(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh, loss=PPO)
    (first, *_) = to_batches(near_samples(policy, seed=0))
    silent = tuple(replace(m, advantage=0 * m.advantage) for m in first.micro_batches)
    before = weights(learner)
    assert learner.update([replace(first, micro_batches=silent)])["grad_norm"] == 0.0
    assert same(before, weights(learner))


def test_a_batch_without_signal_takes_no_part_in_a_step(policy: Path, mesh: Mesh) -> None:
    nothing = Batch(micro_batches=(), denominator=3.0)
    one, other = to_batches(near_samples(policy, seed=0))[:2]
    with_it, without = (build_learner(policy, mesh, loss=PPO, warmup_steps=2) for _ in range(2))
    assert with_it.update([nothing, one, nothing, other]) == without.update([one, other])
    assert same(weights(with_it), weights(without))


def test_the_learning_rate_advances_by_the_step_with_or_without_updates(
    policy: Path, mesh: Mesh
) -> None:
    (one, *_) = to_batches(near_samples(policy, seed=0))
    warming, warm = build_learner(policy, mesh, warmup_steps=2), build_learner(policy, mesh)
    warming.update([Batch(micro_batches=(), denominator=3.0)])
    warming.update([one])
    warm.update([one])
    assert same(weights(warming), weights(warm))


def test_parked_weights_come_and_go_to_the_last_bit(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh)
    parked, initial = ParkedWeights(learner.modules), weights(learner)
    for seed in range(2):
        learner.update(to_batches(near_samples(policy, seed=seed)))
        current = weights(learner)
        assert not same(initial, current)
        with parked.in_place():
            assert same(initial, weights(learner))
        assert same(current, weights(learner))


def test_the_current_weights_come_back_after_an_error(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh)
    parked = ParkedWeights(learner.modules)
    learner.update(to_batches(near_samples(policy, seed=0)))
    current = weights(learner)
    with pytest.raises(KeyError), parked.in_place():
        raise KeyError
    assert same(current, weights(learner))

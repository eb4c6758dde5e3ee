"""The Megatron learner against transformers in float64, and against itself on other layouts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_srpo.batching import pack
from megatron_srpo.engines.megatron.logprobs import token_entropies
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.exchange import exchange
from megatron_srpo.hf_folder import write_folder
from megatron_srpo.types import AlarmError, Batch, Sample
from tests.launch import unlaunched_environment
from tests.parallel.jobs import NUM_SAMPLES, TEMPERATURE, build_learner, hf_gradients
from tests.tiny import logprobs_of, random_samples, reference_logprobs, write_policy

Reference = tuple[float, dict[str, torch.Tensor]]


def reference(policy: Path, samples: list[Sample]) -> Reference:
    """Loss and gradients in float64: every sequence alone, no packing, no Megatron."""
    model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        logprobs = logprobs_of(model, sample.token_ids, temperature=TEMPERATURE)
        credit = torch.tensor(sample.loss_weight * sample.advantage, dtype=torch.float64)[1:]
        loss = loss - (credit * logprobs).sum() / len(samples)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


@pytest.fixture(scope="module")
def expected(policy: Path) -> Reference:
    return reference(policy, random_samples(NUM_SAMPLES, seed=1))


def assert_close(stats: dict[str, float], found: dict[str, torch.Tensor], to: Reference) -> None:
    loss, gradients = to
    assert set(gradients) <= set(found)
    largest = max(float(g.abs().max()) for g in gradients.values())
    off = max(float((found[name] - g).abs().max()) for name, g in gradients.items())
    print(f"\nloss off by {abs(stats['loss'] - loss):.1e}, gradient by {off / largest:.1e} max|g|")
    assert stats["loss"] == pytest.approx(loss, abs=1e-6)
    assert off <= 5e-6 * largest


def run_processes(num: int, policy: Path, out: Path, *flags: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "tests.parallel.gradients", str(policy), str(out), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=unlaunched_environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def test_two_data_parallel_processes_have_the_gradient_of_the_unpacked_float64_reference(
    policy: Path, expected: Reference, tmp_path: Path
) -> None:
    found = run_processes(2, policy, tmp_path / "out.pt", "--max-tokens", "120")
    assert_close(found["stats"], found["gradients"], expected)


@pytest.mark.parametrize("max_tokens", [1, 100, 100_000])
@pytest.mark.parametrize("order", ["as drawn", "reversed"])
def test_the_gradient_does_not_depend_on_micro_batch_size_or_packing_order(
    policy: Path, mesh: Mesh, expected: Reference, max_tokens: int, order: str
) -> None:
    learner = build_learner(policy, mesh)
    samples = random_samples(NUM_SAMPLES, seed=1)
    if order == "reversed":
        samples.reverse()
    stats = learner.backward(exchange(samples, mesh, max_tokens=max_tokens))
    assert_close(stats, hf_gradients(learner, mesh), expected)


def test_samples_without_advantage_change_only_the_denominator(policy: Path, mesh: Mesh) -> None:
    samples = random_samples(6, seed=3)
    silent = [
        Sample(
            id=s.id,
            token_ids=s.token_ids,
            loss_weight=s.loss_weight,
            advantage=np.zeros_like(s.advantage),
            logprob=s.logprob,
            count=s.count,
        )
        for s in samples[3:]
    ]
    learner = build_learner(policy, mesh)
    batch = exchange([*samples[:3], *silent], mesh, max_tokens=1000)
    assert batch.denominator == 6
    assert sum(len(m.sample_ids) for m in batch.micro_batches) == 3
    stats = learner.backward(batch)
    loss, gradients = reference(policy, samples[:3])
    halved = {name: gradient / 2 for name, gradient in gradients.items()}
    assert_close(stats, hf_gradients(learner, mesh), (loss / 2, halved))


def test_three_adamw_steps_follow_torch(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh)
    model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float64)
    adam = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0
    )
    for step in range(3):
        samples = random_samples(5, seed=step)
        stats = learner.update(Batch(micro_batches=(pack(samples),), denominator=5.0))
        adam.zero_grad()
        for sample in samples:
            logprobs = logprobs_of(model, sample.token_ids, temperature=TEMPERATURE)
            credit = torch.tensor(sample.loss_weight * sample.advantage, dtype=torch.float64)[1:]
            (-(credit * logprobs).sum() / 5).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        adam.step()
        assert norm > 0.05, "the clip must bite for the test to see it"
        assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    exported = dict(learner.export())
    for name, parameter in model.named_parameters():
        assert float((exported[name] - parameter.detach()).abs().max()) < 1e-5, name


def test_logprobs_are_transformers_at_the_training_temperature(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh)
    sequences = [sample.token_ids for sample in random_samples(4, seed=5)]
    for tokens, found in zip(
        sequences, learner.logprobs(sequences, temperature=TEMPERATURE), strict=True
    ):
        right = reference_logprobs(policy, tokens, temperature=TEMPERATURE).detach().numpy()
        np.testing.assert_allclose(found, right, atol=5e-6)


def test_entropy_is_that_of_the_tempered_distribution(mesh: Mesh) -> None:
    logits = torch.randn(7, 31, generator=torch.Generator().manual_seed(0)) * 8
    found = token_entropies(logits, temperature=0.5, group=mesh.tp_group)
    right = torch.distributions.Categorical(logits=logits.double() / 0.5).entropy()
    torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_goes_in_and_comes_out_bit_equal(mesh: Mesh, tmp_path: Path, tied: bool) -> None:
    folder = write_policy(tmp_path / "in", seed=7, tied=tied)
    learner = build_learner(folder, mesh)
    write_folder(tmp_path / "out", learner.export(), like=folder, tied=tied)
    before = Qwen2ForCausalLM.from_pretrained(folder).state_dict()
    after = Qwen2ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_a_number_names_its_samples(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh)
    good, bad = random_samples(2, seed=9)
    with torch.no_grad():
        learner.module.embedding.word_embeddings.weight[int(bad.token_ids[3])] = float("nan")
    with pytest.raises(AlarmError, match=f"the loss is not finite in samples .*{bad.id}"):
        learner.update(Batch(micro_batches=(pack([good, bad]),), denominator=2.0))


def test_a_batch_without_signal_leaves_the_policy_as_it_is(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh)
    before = {name: tensor.clone() for name, tensor in learner.export()}
    assert learner.update(Batch(micro_batches=(), denominator=8.0))["grad_norm"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.export())

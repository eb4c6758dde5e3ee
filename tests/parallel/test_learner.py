"""The Megatron learner against transformers in float64, and against itself on other layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_srpo.batching import pack
from megatron_srpo.data import demonstration_sample
from megatron_srpo.engines.megatron.forward import Forward
from megatron_srpo.engines.megatron.logprobs import (
    HEADS,
    Head,
    fused,
    scaled_logits,
    token_entropies,
)
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.exchange import exchange
from megatron_srpo.hf_writer import write_folder
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.types import AlarmError, Batch, Sample
from tests.parallel.jobs import (
    NUM_SAMPLES,
    TEMPERATURE,
    build_learner,
    hf_gradients,
    three_steps,
)
from tests.parallel.reference import (
    Reference,
    assert_gradient,
    assert_three_steps,
    loss_and_gradients,
    three_adamw_steps,
)
from tests.tiny import random_samples, reference_logprobs, write_policy


@pytest.fixture(scope="module")
def expected(policy: Path) -> Reference:
    return loss_and_gradients(policy, random_samples(NUM_SAMPLES, seed=1))


@pytest.mark.parametrize("max_tokens", [1, 100, 100_000])
@pytest.mark.parametrize("order", ["as drawn", "reversed"])
@pytest.mark.parametrize("padded_for", [{}, {"cp": 3, "tp": 2}], ids=["unpadded", "padded"])
def test_the_gradient_does_not_depend_on_micro_batch_size_packing_order_or_padding(
    policy: Path,
    mesh: Mesh,
    expected: Reference,
    max_tokens: int,
    order: str,
    padded_for: dict[str, int],
) -> None:
    learner = build_learner(policy, mesh)
    samples = random_samples(NUM_SAMPLES, seed=1)
    if order == "reversed":
        samples.reverse()
    layout = PackLayout.of(num_slots=1, max_tokens=max_tokens, **padded_for)
    stats = learner.backward(exchange(samples, mesh, layout=layout))
    assert_gradient(stats, hf_gradients(learner, mesh), expected)


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
    batch = exchange([*samples[:3], *silent], mesh, layout=PackLayout.on(mesh, max_tokens=1000))
    assert batch.denominator == 6
    assert sum(len(m.sample_ids) for m in batch.micro_batches) == 3
    stats = learner.backward(batch)
    loss, gradients = loss_and_gradients(policy, samples[:3])
    halved = {name: gradient / 2 for name, gradient in gradients.items()}
    assert_gradient(stats, hf_gradients(learner, mesh), (loss / 2, halved))


@pytest.mark.parametrize("count", [1.0, 40.0, 0.0])
def test_an_auxiliary_loss_is_its_weight_times_its_mean_whatever_the_denominator(
    mesh: Mesh, count: float
) -> None:
    """The policy's samples count 1 each (means of sequences), 40 (tokens), nothing (all masked)."""
    nothing = np.float32(count > 0)
    policy = [
        replace(sample, count=count, loss_weight=sample.loss_weight * nothing)
        for sample in random_samples(5, seed=1)
    ]
    tokens = np.arange(2, 12, dtype=np.int32)
    shown = [
        demonstration_sample(f"d{i}", tokens[:2], tokens[2 : 5 + i], weight=0.1, count=0.0)
        for i in range(3)
    ]
    batch = exchange([*policy, *shown], mesh, layout=PackLayout.on(mesh, max_tokens=1000))
    total = sum(m.loss_weight[np.isnan(m.logprob)].sum() for m in batch.micro_batches)
    assert total / batch.denominator == pytest.approx(0.1, rel=1e-6)


def test_three_adamw_steps_follow_torch(policy: Path, mesh: Mesh) -> None:
    stats, exported = three_steps(build_learner(policy, mesh), mesh)
    assert_three_steps(stats, exported, three_adamw_steps(policy))


@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0, 2.0])
def test_logprobs_are_transformers_at_any_temperature(
    policy: Path, mesh: Mesh, temperature: float
) -> None:
    learner = build_learner(policy, mesh)
    sequences = [sample.token_ids for sample in random_samples(4, seed=5)]
    assert learner.logprobs([], temperature=temperature) == []
    for tokens, found in zip(
        sequences, learner.logprobs(sequences, temperature=temperature), strict=True
    ):
        right = reference_logprobs(policy, tokens, temperature=temperature).detach().numpy()
        np.testing.assert_allclose(found, right, atol=5e-6)


def test_entropy_is_that_of_the_tempered_distribution_over_real_tokens(mesh: Mesh) -> None:
    logits = torch.randn(7, 31, generator=torch.Generator().manual_seed(0)) * 8
    scaled = scaled_logits(logits, temperature=0.5, num_real=29)
    found = token_entropies(scaled, group=mesh.tp_group)
    right = torch.distributions.Categorical(logits=logits[:, :29].double() / 0.5).entropy()
    torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_what_the_loss_does_not_want_is_not_looked_at(mesh: Mesh, head: Head) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=random) for n in (7, 31))
    targets, is_wanted = torch.arange(7) * 4, torch.arange(7) % 3 == 1
    hidden[~is_wanted] = float("nan")
    hidden.requires_grad_()
    found = head(
        hidden, weight, targets, is_wanted, temperature=0.5, num_real=29, group=mesh.tp_group
    )
    logits = (hidden.detach() @ weight[:29].T)[is_wanted].double() / 0.5
    right = torch.distributions.Categorical(logits=logits)
    wanted = right.log_prob(targets[is_wanted]), right.entropy()
    for values, correct in zip(found, wanted, strict=True):
        assert torch.equal(values[~is_wanted], torch.zeros(5))
        torch.testing.assert_close(values[is_wanted].double(), correct, rtol=1e-5, atol=1e-5)


def test_tokens_that_the_loss_does_not_want_have_no_gradient(mesh: Mesh) -> None:
    hidden, weight = (torch.ones(n, 4).requires_grad_() for n in (5, 8))
    targets = torch.zeros(5, dtype=torch.long)
    is_wanted = torch.zeros(5, dtype=torch.bool)
    found, _ = fused(
        hidden, weight, targets, is_wanted, temperature=1.0, num_real=8, group=mesh.tp_group
    )
    found.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(5, 4))
    assert torch.equal(weight.grad, torch.zeros(8, 4))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_s_gradient_is_the_same_if_it_goes_right_to_megatron_s_buffer(
    mesh: Mesh, tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_policy(tmp_path / "policy", seed=7, tied=tied)
    gradients: list[dict[str, torch.Tensor]] = []
    returned: list[torch.Tensor] = []
    for goes_there in (False, True):
        learner = build_learner(folder, mesh)
        weight = learner._forward._head_weight
        weight.register_hook(returned.append)
        layout = PackLayout.on(mesh, max_tokens=100)
        with monkeypatch.context() as patch:
            if not goes_there:
                patch.setattr(Forward, "_main_grad", None)
            learner.backward(exchange(random_samples(NUM_SAMPLES, seed=1), mesh, layout=layout))
        assert vars(weight)["grad_added_to_main_grad"] == goes_there
        gradients.append(hf_gradients(learner, mesh))
    right, found = gradients
    for name, gradient in right.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)
    own, fused_own = returned[: len(returned) // 2], returned[len(returned) // 2 :]
    assert len(own) == len(fused_own) > 1
    assert all(x.any() for x in own)
    assert tied or not any(x.any() for x in fused_own)  # else the embedding's is there


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
        learner.modules[0].embedding.word_embeddings.weight[int(bad.token_ids[3])] = float("nan")
    with pytest.raises(AlarmError, match=f"the loss is not finite in samples .*{bad.id}"):
        learner.update(
            [
                Batch(
                    micro_batches=(pack([good, bad], PackLayout.on(mesh, max_tokens=1000)),),
                    denominator=2.0,
                )
            ]
        )


def test_a_batch_without_signal_leaves_the_policy_as_it_is(policy: Path, mesh: Mesh) -> None:
    learner = build_learner(policy, mesh)
    before = {name: tensor.clone() for name, tensor in learner.export()}
    assert learner.update([Batch(micro_batches=(), denominator=8.0)])["grad_norm"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.export())

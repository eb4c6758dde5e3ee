"""What is right: transformers and torch in float64, every sequence alone, no packing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_srpo.types import Sample, Tokens
from tests.parallel.jobs import TEMPERATURE, Tensors
from tests.tiny import by_stored_name, logprobs_of, random_samples, transformers_model

Reference = tuple[float, Tensors]


def loss_and_gradients(policy: Path, samples: list[Sample]) -> Reference:
    model = transformers_model(policy)
    loss = _loss(model, samples)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), by_stored_name(gradients)


def three_adamw_steps(policy: Path) -> tuple[list[float], Tensors]:
    """Gradient norms, and the parameters after the third step."""
    model = transformers_model(policy)
    adam = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0
    )
    norms: list[float] = []
    for step in range(3):
        adam.zero_grad()
        _loss(model, random_samples(5, seed=step)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        assert norms[-1] > 0.05, "the clip must bite for the test to see it"
        adam.step()
    return norms, by_stored_name({name: p.detach() for name, p in model.named_parameters()})


@torch.no_grad()
def logits(policy: Path, sequences: Sequence[Tokens]) -> list[torch.Tensor]:
    """Each [T - 1, vocabulary]"""
    model = transformers_model(policy)
    inputs = [torch.tensor(tokens[:-1], dtype=torch.long)[None] for tokens in sequences]
    return [model(ids).logits[0] for ids in inputs]


def _loss(model: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        logprobs = logprobs_of(model, sample.token_ids, temperature=TEMPERATURE)
        credit = torch.tensor(sample.loss_weight * sample.advantage, dtype=torch.float64)[1:]
        loss = loss - (credit * logprobs).sum() / len(samples)
    return loss


def gradient_difference(
    stats: dict[str, float], found: Tensors, to: Reference
) -> tuple[float, float]:
    """(loss, gradient as a share of its largest element)"""
    loss, gradients = to
    assert set(gradients) <= set(found)
    largest = max(float(g.abs().max()) for g in gradients.values())
    off = max(float((found[name] - g).abs().max()) for name, g in gradients.items())
    return abs(stats["loss"] - loss), off / largest


def assert_gradient(stats: dict[str, float], found: Tensors, to: Reference) -> None:
    loss, gradient = gradient_difference(stats, found, to)
    print(f"\nloss off by {loss:.1e}, gradient by {gradient:.1e} max|g|")
    assert loss <= 1e-6
    assert gradient <= 5e-6


def steps_difference(
    stats: list[dict[str, float]], exported: Tensors, to: tuple[list[float], Tensors]
) -> tuple[float, float]:
    """(gradient norms, relative; parameters after the third step)"""
    norms, parameters = to
    off = max(float((exported[name] - p).abs().max()) for name, p in parameters.items())
    norm = max(abs(s["grad_norm"] / right - 1) for s, right in zip(stats, norms, strict=True))
    return norm, off


def assert_three_steps(
    stats: list[dict[str, float]], exported: Tensors, to: tuple[list[float], Tensors]
) -> None:
    norm, off = steps_difference(stats, exported, to)
    print(f"\ngradient norm off by {norm:.1e}, parameters after three steps by {off:.1e}")
    assert norm <= 5e-6
    assert off < 1e-5

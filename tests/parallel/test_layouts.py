"""Every family of models on every kind of layout, against transformers in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_srpo.hf_folder import read_tensors
from tests.parallel import jobs, parity, reference
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, reference_logprobs, write_policy

SHORT = ("PP2xVPP2", "CP2", "TP2xPP2")
"""For every family; benchmarks/parity.md has all pairs."""
PAIRS = [
    (family, layout)
    for family in FAMILIES
    for layout in parity.LAYOUTS
    if parity.fits(family, layout) and (family == "qwen2" or layout in SHORT or "EP" in layout)
]
on_every_layout = pytest.mark.parametrize(
    ("family", "layout"), PAIRS, ids=[f"{family}-{layout}" for family, layout in PAIRS]
)
Found = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> parity.References:
    return parity.References(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def found(pool: Pool, families: parity.References) -> Found:
    """What each rank of a layout says; a layout is run once."""

    @cache
    def run(family: str, layout: str) -> list[dict[str, Any]]:
        # One micro-batch for each sequence, several, all.
        max_tokens = (1, 100, 100_000) if family == "qwen2" else (100,)
        num, parallel = parity.LAYOUTS[layout]
        return pool.run(num, jobs.on_layout, families.policy(family), max_tokens, **parallel)

    return run


@on_every_layout
def test_logits_are_those_of_transformers(
    found: Found, families: parity.References, family: str, layout: str
) -> None:
    off = families.logit_difference(family, found(family, layout))
    print(f"\nlogits off by {off:.1e}")
    assert off <= 1e-5


@on_every_layout
def test_the_gradient_is_that_of_the_unpacked_float64_reference(
    found: Found, families: parity.References, family: str, layout: str
) -> None:
    ranks = found(family, layout)
    for max_tokens, (stats, gradient) in ranks[0]["gradients"].items():
        reference.assert_gradient(stats, gradient, families.gradient(family))
        others = [rank["gradients"][max_tokens][0] for rank in ranks]
        assert all(other == stats for other in others), "metrics are equal on all ranks"


@on_every_layout
def test_three_adamw_steps_follow_torch(
    found: Found, families: parity.References, family: str, layout: str
) -> None:
    stats, exported = found(family, layout)[0]["steps"]
    reference.assert_three_steps(stats, exported, families.three_steps(family))


@on_every_layout
def test_a_folder_goes_in_and_comes_out_bit_equal_on_every_rank(
    found: Found, families: parity.References, family: str, layout: str
) -> None:
    right = dict(read_tensors(families.policy(family)))
    right.setdefault("lm_head.weight", right["model.embed_tokens.weight"])
    for rank in found(family, layout):
        assert rank["exported"].keys() == right.keys()
        assert all(torch.equal(rank["exported"][name], tensor) for name, tensor in right.items())


@on_every_layout
def test_logprobs_are_transformers_on_every_rank(
    found: Found, families: parity.References, family: str, layout: str
) -> None:
    off = 0.0
    for tokens, logprobs in (pair for rank in found(family, layout) for pair in rank["logprobs"]):
        right = reference_logprobs(families.policy(family), tokens, temperature=jobs.TEMPERATURE)
        off = max(off, float(np.abs(logprobs - right.detach().numpy()).max()))
    print(f"\nlog-probs off by {off:.1e} nats")
    assert off <= 1e-5


@on_every_layout
def test_a_loss_that_is_not_a_number_stops_every_rank_and_names_each_sample_once(
    found: Found, family: str, layout: str
) -> None:
    (message,) = {rank["alarm"] for rank in found(family, layout)}
    head, _, named = message.partition("samples ")
    assert head == "the loss is not finite in "
    assert sorted(named.split(", ")) == [f"sample{i}" for i in range(4)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2xVPP2", "CP2", "DP2"])
def test_several_updates_with_every_part_of_the_loss_are_those_of_one_process(
    pool: Pool, tmp_path_factory: pytest.TempPathFactory, layout: str, tied: bool
) -> None:
    folder = tmp_path_factory.mktemp("policy")
    policy = write_policy(folder, seed=7, tied=tied, num_layers=4)
    num, parallel = parity.LAYOUTS[layout]
    ranks = pool.run(num, jobs.updated, policy, **parallel)
    ((stats, alone),) = pool.run(1, jobs.updated, policy)
    assert all(rank[0] == ranks[0][0] for rank in ranks)
    other, tensors = ranks[0]
    off = max(float((tensors[name] - tensor).abs().max()) for name, tensor in alone.items())
    print(f"\nparameters after two updates off by {off:.1e}")
    assert off < 1e-5
    assert other == pytest.approx(stats, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("layout", ["one process", "TP2", "TP2xCP2", "PP2xVPP2"])
@pytest.mark.parametrize("family", ["qwen2", "llama"], ids=["tied", "untied"])
def test_the_reference_head_has_the_gradient_and_the_metrics_of_the_fused_one(
    pool: Pool, found: Found, families: parity.References, family: str, layout: str
) -> None:
    num, parallel = parity.LAYOUTS[layout]
    stats, gradient = pool.run(num, jobs.by_reference_head, families.policy(family), **parallel)[0]
    reference.assert_gradient(stats, gradient, families.gradient(family))
    fused, _ = found(family, layout)[0]["gradients"][100]
    assert stats == pytest.approx(fused, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "bounds", [[0, 37], [0, 20, 37], [0, 36, 37], [0, 0, 37], [0, 10, 20, 30, 37], [0, 9, 9, 9, 37]]
)
def test_ranks_that_share_a_vocabulary_have_the_same_bits_and_what_one_process_has(
    pool: Pool, bounds: list[int]
) -> None:
    num = len(bounds) - 1
    first, *others = pool.run(num, jobs.shared_vocabulary, bounds, tp=num)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    (alone,) = pool.run(1, jobs.shared_vocabulary, [0, 37])
    for one, right in zip(first, alone, strict=True):
        # Gradients, whose rows are weighted with up to 9, to 1e-6 of their largest element.
        atol = max(5e-6, 1e-6 * float(right.abs().max()))
        torch.testing.assert_close(one, right, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("bounds", [[0, 20, 37], [0, 10, 20, 30, 37]], ids=["tp2", "tp4"])
def test_ranks_that_share_logits_or_a_loss_in_one_pass_have_the_same_bits(
    pool: Pool, bounds: list[int]
):
    num = len(bounds) - 1
    first, *others = pool.run(num, jobs.shared_operations, bounds, tp=num)
    (alone,) = pool.run(1, jobs.shared_operations, [0, 37])
    for other in others:
        assert other[1] == first[1]
        assert all(torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))
    for one, right in zip(first[0], alone[0], strict=True):
        torch.testing.assert_close(one, right, rtol=1e-6, atol=5e-6)
    assert first[1] == pytest.approx(alone[1], rel=1e-5, abs=1e-6)


def test_one_key_value_head_can_be_shared_by_tensor_parallel_ranks(
    pool: Pool, tmp_path: Path
) -> None:
    policy = write_policy(tmp_path, seed=7, num_key_value_heads=1)
    ranks = pool.run(2, jobs.on_layout, policy, (100,), tp=2)
    stats, gradient = ranks[0]["gradients"][100]
    samples = parity.samples()
    reference.assert_gradient(stats, gradient, reference.loss_and_gradients(policy, samples))
    reference.assert_three_steps(*ranks[0]["steps"], reference.three_adamw_steps(policy))

"""Tensor, pipeline and data parallel learners against transformers in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_srpo.hf_folder import read_tensors
from megatron_srpo.types import AlarmError, Score
from tests.parallel import jobs, reference
from tests.parallel.pool import Pool
from tests.tiny import random_samples, reference_logprobs, write_policy

LAYOUTS = {
    "TP2": (2, 2, 1),
    "PP2": (2, 1, 2),
    "DP2": (2, 1, 1),
    "TP2xPP2": (4, 2, 2),
    "TP2xDP2": (4, 2, 1),
    "PP2xDP2": (4, 1, 2),
}
"""(processes, TP, PP)"""
on_every_layout = pytest.mark.parametrize("layout", LAYOUTS)
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def policies(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether the head is tied to the embedding."""
    untied = write_policy(tmp_path_factory.mktemp("untied"), seed=7, tied=False)
    return {True: policy, False: untied}


@pytest.fixture(scope="module")
def gradients(policies: dict[bool, Path]) -> dict[bool, reference.Reference]:
    samples = random_samples(jobs.NUM_SAMPLES, seed=1)
    return {t: reference.loss_and_gradients(folder, samples) for t, folder in policies.items()}


@pytest.fixture(scope="module")
def steps(policies: dict[bool, Path]) -> dict[bool, tuple[list[float], jobs.Tensors]]:
    return {tied: reference.three_adamw_steps(folder) for tied, folder in policies.items()}


@pytest.fixture(scope="module")
def found(pool: Pool, policies: dict[bool, Path]) -> Callable[[str, bool], list[dict[str, Any]]]:
    """What each rank of a layout says; a layout is run once."""

    @cache
    def run(layout: str, tied: bool) -> list[dict[str, Any]]:
        num, tp, pp = LAYOUTS.get(layout, (1, 1, 1))
        return pool.run(num, jobs.on_layout, policies[tied], tp=tp, pp=pp)

    return run


@on_every_layout
@tied_or_not
@pytest.mark.parametrize("max_tokens", jobs.MAX_TOKENS)
def test_the_gradient_is_that_of_the_unpacked_float64_reference(
    found: Any, gradients: Any, layout: str, tied: bool, max_tokens: int
) -> None:
    answers = [rank["gradients"][max_tokens] for rank in found(layout, tied)]
    stats, gradient = answers[0]
    reference.assert_gradient(stats, gradient, gradients[tied])
    assert all(other == stats for other, _ in answers), "metrics are equal on all ranks"


@on_every_layout
@tied_or_not
def test_three_adamw_steps_follow_torch(found: Any, steps: Any, layout: str, tied: bool) -> None:
    stats, exported = found(layout, tied)[0]["steps"]
    reference.assert_three_steps(stats, exported, steps[tied])


@on_every_layout
@tied_or_not
def test_several_updates_with_every_part_of_the_loss_are_those_of_one_process(
    found: Any, layout: str, tied: bool
) -> None:
    stats, alone = found("alone", tied)[0]["updated"]
    for rank in found(layout, tied):
        assert rank["updated"][0] == found(layout, tied)[0]["updated"][0]
    other, tensors = found(layout, tied)[0]["updated"]
    off = max(float((tensors[name] - tensor).abs().max()) for name, tensor in alone.items())
    print(f"\nparameters after two updates off by {off:.1e}")
    assert off < 1e-5
    assert other == pytest.approx(stats, rel=1e-4, abs=1e-6)


@on_every_layout
@tied_or_not
def test_a_folder_goes_in_and_comes_out_bit_equal_on_every_rank(
    found: Any, policies: dict[bool, Path], layout: str, tied: bool
) -> None:
    right = dict(read_tensors(policies[tied]))
    right.setdefault("lm_head.weight", right["model.embed_tokens.weight"])
    for rank in found(layout, tied):
        assert rank["exported"].keys() == right.keys()
        assert all(torch.equal(rank["exported"][name], tensor) for name, tensor in right.items())


@on_every_layout
@tied_or_not
def test_logprobs_are_transformers_on_every_rank(
    found: Any, policies: dict[bool, Path], layout: str, tied: bool
) -> None:
    off = 0.0
    for tokens, logprobs in (pair for rank in found(layout, tied) for pair in rank["logprobs"]):
        right = reference_logprobs(policies[tied], tokens, temperature=jobs.TEMPERATURE)
        off = max(off, float(np.abs(logprobs - right.detach().numpy()).max()))
    print(f"\nlog-probs off by {off:.1e} nats")
    assert off <= 5e-6


@on_every_layout
@tied_or_not
def test_a_loss_that_is_not_a_number_stops_every_rank_and_names_each_sample_once(
    found: Any, layout: str, tied: bool
) -> None:
    (message,) = {rank["alarm"] for rank in found(layout, tied)}
    head, _, named = message.partition("samples ")
    assert head == "the loss is not finite in "
    assert sorted(named.split(", ")) == [f"sample{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("num", "tp", "pp", "rollout_tp"), [(4, 2, 1, 1), (4, 1, 2, 2), (4, 2, 2, 4)]
)
def test_a_sample_reaches_all_ranks_of_one_copy_of_the_policy(
    pool: Pool, num: int, tp: int, pp: int, rollout_tp: int
) -> None:
    answers = pool.run(num, jobs.exchanged, tp=tp, pp=pp, rollout_tp=rollout_tp)
    of_slot: dict[int, list[str]] = {}
    for slot, ids, denominator in answers:
        assert denominator == jobs.NUM_SAMPLES
        assert of_slot.setdefault(slot, ids) == ids, "ranks of one slot hold the same batch"
    assert len(of_slot) == num // (tp * pp)
    everything = sorted(id for ids in of_slot.values() for id in ids)
    assert everything == sorted(s.id for s in random_samples(jobs.NUM_SAMPLES, seed=1))


def test_samples_without_advantage_travel_only_where_the_loss_asks_for_them(pool: Pool) -> None:
    for with_silent, expected in ((False, 3), (True, 5)):
        found = pool.run(2, jobs.silent_samples, with_silent)
        assert sum(num_sent for num_sent, _ in found) == expected
        assert [denominator for _, denominator in found] == [6.0, 6.0]


def test_the_leader_s_reward_is_its_replica_s(pool: Pool) -> None:
    scores = pool.run(4, jobs.rewarded_by_rank, tp=1, rollout_tp=2)
    assert scores == [0.0, 0.0, 2.0, 2.0]


def test_a_reward_that_raises_on_the_leader_raises_the_same_on_its_ranks_and_hangs_none(
    pool: Pool,
) -> None:
    messages = pool.run(2, jobs.reward_raises, rollout_tp=2)
    assert messages == ["the reward of prompt 'p' raised KeyError: 'no such answer'"] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "raised TypeError: it must give a Score, not None"),
        (0.5, "raised TypeError: it must give a Score, not 0.5"),
        (
            Score(value=float("nan"), correct=False),
            "raised ValueError: the value of a Score must be finite, not nan",
        ),
        (Score(value=np.float32(1), correct=np.bool_(True)), "float bool"),  # type: ignore[arg-type]
    ],
)
def test_a_reward_gives_a_plain_finite_score_or_stops_the_run(
    pool: Pool, given: object, message: str
) -> None:
    for found in pool.run(2, jobs.reward_gives, given, rollout_tp=2):
        assert found.endswith(message)


def test_only_the_leader_s_rule_is_asked_and_its_ranks_generate_what_it_asks_for(
    pool: Pool,
) -> None:
    found = pool.run(4, jobs.reset_by_rank, rollout_tp=2)
    for rank, (thought, num_asked, requests) in enumerate(found):
        leader = rank // 2 * 2
        assert thought == leader
        assert num_asked == (rank == leader)
        assert requests == [f"{leader}/{number}/{i}" for number in range(2) for i in range(3)]


def test_a_rule_that_raises_on_the_leader_raises_the_same_on_its_ranks_and_hangs_none(
    pool: Pool,
) -> None:
    messages = pool.run(2, jobs.rule_raises, 0, rollout_tp=2)
    assert messages == ["the reset rule raised OSError: no such file"] * 2


def test_a_rule_that_would_raise_on_another_rank_is_not_asked_there(pool: Pool) -> None:
    assert pool.run(2, jobs.rule_raises, 1, rollout_tp=2) == ["no alarm"] * 2


def test_a_failed_rank_fails_its_job_and_leaves_the_pool_usable(pool: Pool) -> None:
    with pytest.raises(AlarmError, match="rank 1 fails"):
        pool.run(2, jobs.fail_on_rank_1)
    assert pool.run(2, jobs.rank_sum) == [1, 1]

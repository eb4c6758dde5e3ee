"""The gradient behind chain credit: an identity, where it is parallel, and where it misleads."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from megatron_srpo.theory.mdp import Reals
from megatron_srpo.theory.product_rule import (
    Localizer,
    Paths,
    anywhere,
    cosine,
    exact_gradient,
    extended,
    first_wrong,
    mean_credit,
    of_prefixes,
    path_weights,
    random_paths,
    reset_distribution,
    value,
)


def drawn(seed: int, *, num_right: int, own_logits: bool = False, skill: float = 0.0) -> Paths:
    return random_paths(
        np.random.default_rng(seed),
        horizon=4,
        num_actions=3,
        num_right=num_right,
        own_logits=own_logits,
        skill=skill,
    )


def probabilities(paths: Paths) -> Reals:
    """Of each path, step by step: no array of prefixes, no matrix."""
    found = []
    for path in product(range(paths.num_actions), repeat=len(paths.logits)):
        probability, prefix = 1.0, 0
        for action, logits in zip(path, paths.logits, strict=True):
            odds = np.exp(logits[prefix % len(logits)])
            probability *= odds[action] / odds.sum()
            prefix = prefix * paths.num_actions + action
        found.append(probability)
    return np.array(found)


def numeric_gradient(paths: Paths, weight_Y: Reals) -> Reals:
    """Of sum_y weight pi(y), by central differences."""
    flat_D = np.concatenate([logits.ravel() for logits in paths.logits])
    ends = np.cumsum([logits.size for logits in paths.logits])[:-1]

    def objective(moved_D: Reals) -> float:
        parts = np.split(moved_D, ends)
        pairs = zip(parts, paths.logits, strict=True)
        logits = tuple(part.reshape(old.shape) for part, old in pairs)
        return float(weight_Y @ probabilities(replace(paths, logits=logits)))

    steps_DD = 1e-5 * np.eye(len(flat_D))
    return np.array([objective(flat_D + s) - objective(flat_D - s) for s in steps_DD]) / 2e-5


@pytest.mark.parametrize("own_logits", [False, True])
def test_the_exact_gradient_is_that_of_finite_differences(own_logits: bool):
    paths = drawn(0, num_right=5, own_logits=own_logits)
    np.testing.assert_allclose(extended(paths, 0, 4)[0], probabilities(paths), rtol=1e-12)
    np.testing.assert_allclose(
        exact_gradient(paths), numeric_gradient(paths, paths.rewards_Y), atol=1e-9
    )


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("num_right", [1, 7, 40])
@pytest.mark.parametrize("own_logits", [False, True])
def test_the_product_rule_is_an_identity(depth: int, num_right: int, own_logits: bool):
    paths = drawn(1, num_right=num_right, own_logits=own_logits)
    error_D = of_prefixes(paths, depth) - exact_gradient(paths)
    assert np.abs(error_D).max() < 1e-12
    without_prefix_D = extended(paths, 0, depth)[0] @ value(paths, depth)[1]
    assert (np.abs(without_prefix_D - exact_gradient(paths)).max() > 1e-4) == (depth > 0)


def test_first_wrong_is_the_decision_that_leaves_every_right_path():
    # Right: 0 0 0 0 and 0 1 2 2. Of 0 1 0 0 two decisions are still good, of 0 0 0 2 three.
    rewards_Y = np.zeros((3, 3, 3, 3))
    rewards_Y[0, 0, 0, 0] = rewards_Y[0, 1, 2, 2] = 1
    paths = replace(drawn(0, num_right=1), rewards_Y=rewards_Y.ravel())
    cut = first_wrong(paths).reshape(3, 3, 3, 3, 4)
    assert cut[2, 0, 0, 0].argmax() == 0
    assert cut[0, 2, 0, 0].argmax() == 1
    assert cut[0, 1, 0, 0].argmax() == 2
    assert cut[0, 0, 0, 2].argmax() == 3


@pytest.mark.parametrize("localizer", [first_wrong, anywhere])
def test_every_failed_path_is_reset_once(localizer: Localizer):
    q = reset_distribution(drawn(2, num_right=4), localizer)
    assert sum(q_Z.sum() for q_Z in q) == pytest.approx(1)


@pytest.mark.parametrize("localizer", [first_wrong, anywhere])
@pytest.mark.parametrize("own_logits", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_with_one_right_path_chain_credit_is_parallel_to_the_gradient(
    localizer: Localizer, own_logits: bool, seed: int
):
    paths = drawn(seed, num_right=1, own_logits=own_logits, skill=1.0)
    true_D = exact_gradient(paths)
    scale = path_weights(paths, localizer)[paths.rewards_Y == 1].item()
    np.testing.assert_allclose(
        mean_credit(paths, localizer, prefix=1), scale * true_D, rtol=1e-9, atol=1e-14
    )
    # The masked prefix, half of the prefix, and a baseline on it are not.
    for others in ({"prefix": 0}, {"prefix": 0.5}, {"prefix": 1, "baseline": 0.5}):
        assert cosine(mean_credit(paths, localizer, **others), true_D) < 1 - 1e-4


@pytest.mark.parametrize("localizer", [first_wrong, anywhere])
@pytest.mark.parametrize("num_right", [2, 20])
def test_chain_credit_is_the_gradient_of_reweighted_right_paths(
    localizer: Localizer, num_right: int
):
    paths = drawn(3, num_right=num_right)
    weight_Y = path_weights(paths, localizer)
    assert (weight_Y[paths.rewards_Y == 1] >= 0).all()
    np.testing.assert_allclose(
        mean_credit(paths, localizer, prefix=1),
        numeric_gradient(paths, weight_Y * paths.rewards_Y),
        atol=1e-8,
    )


def test_with_several_right_paths_chain_credit_is_not_parallel():
    paths = drawn(3, num_right=20)
    assert cosine(mean_credit(paths, first_wrong, prefix=1), exact_gradient(paths)) < 0.99


def two_ways() -> Paths:
    """Action 0, then right in one of three cases; or action 1, and always right; 2 is wrong."""
    rewards_Y = np.array([1, 0, 0, 1, 1, 1, 0, 0, 0], float)
    first = np.log([[0.45, 0.45, 0.1]])
    return Paths(logits=(first, np.zeros((3, 3))), rewards_Y=rewards_Y)


def test_where_one_way_is_safer_chain_credit_leads_to_the_other_one():
    # V = .45 / 3 + .45 = .6. True: pi(a) (V(a) - V) = .45 (1/3 - .6), .45 (1 - .6), .1 (0 - .6).
    paths = two_ways()
    assert exact_gradient(paths)[:3].tolist() == pytest.approx([-0.12, 0.18, -0.06])
    # Failures: .3 after action 0, cut behind it; .1 at action 2, cut at the start (q = 3/4, 1/4).
    # Chain: 1/4 of the true one, and 3/4 V(a) (1 - pi(a)) = .1375 for action 0.
    chain_D = mean_credit(paths, first_wrong, prefix=1)
    expected = [-0.03 + 0.25 * 0.55, 0.045 - 0.25 * 0.45, -0.015 - 0.25 * 0.1]
    assert chain_D[:3].tolist() == pytest.approx(expected)
    assert chain_D[0] > 0 > exact_gradient(paths)[0]


def test_where_prefixes_share_no_logits_the_masked_prefix_has_no_wrong_sign():
    for seed in range(20):
        paths = drawn(seed, num_right=25, own_logits=True, skill=1.0)
        for localizer in (first_wrong, anywhere):
            masked_D = mean_credit(paths, localizer, prefix=0)
            assert (masked_D * exact_gradient(paths)).min() > -1e-15


def test_a_gradient_of_zero_has_no_direction():
    assert cosine(np.zeros(3), np.ones(3)) == 0

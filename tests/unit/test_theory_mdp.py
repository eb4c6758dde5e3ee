"""Dynamic programming against the enumeration of trajectories."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megatron_srpo.theory.instances import (
    ChainShape,
    Problem,
    dialled_chain,
    random_problem,
    random_shape,
    trap,
)
from megatron_srpo.theory.mdp import LayeredMDP, advantages, occupancies, performance, values


def small(seed: int) -> Problem:
    """At most 7 states, 4 layers: few enough trajectories."""
    rng = np.random.default_rng(seed)
    while True:
        problem = random_problem(rng)
        num_layers, num_states, num_actions = problem.policy_HSA.shape
        if (num_states * num_actions) ** num_layers <= 50_000:
            return problem


def trajectories(problem: Problem):
    """(states, actions, probability, mean reward) of each."""
    mdp, policy_HSA = problem.mdp, problem.policy_HSA
    num_layers, num_states, num_actions = policy_HSA.shape
    for states in product(range(num_states), repeat=num_layers):
        for actions in product(range(num_actions), repeat=num_layers):
            probability = mdp.start_S[states[0]]
            for h in range(num_layers):
                probability *= policy_HSA[h, states[h], actions[h]]
                if h + 1 < num_layers:
                    probability *= mdp.transitions_HSAS[h, states[h], actions[h], states[h + 1]]
            last = mdp.transitions_HSAS[-1, states[-1], actions[-1]]
            yield states, actions, probability, last @ mdp.rewards_S


@pytest.mark.parametrize("seed", range(3))
def test_values_and_occupancies_are_those_of_all_trajectories(seed: int):
    problem = small(seed)
    num_layers, num_states, num_actions = problem.policy_HSA.shape
    reached = np.zeros((num_layers, num_states, num_actions))
    earned = np.zeros_like(reached)
    mean = 0.0
    for states, actions, probability, reward in trajectories(problem):
        mean += probability * reward
        for h in range(num_layers):
            reached[h, states[h], actions[h]] += probability
            earned[h, states[h], actions[h]] += probability * reward
    q_HSA, _ = values(problem.mdp, problem.policy_HSA)
    np.testing.assert_allclose(q_HSA[reached > 0], (earned / reached)[reached > 0], rtol=1e-9)
    np.testing.assert_allclose(
        occupancies(problem.mdp, problem.policy_HSA), reached.sum(2), atol=1e-13
    )
    assert performance(problem.mdp, problem.policy_HSA) == pytest.approx(mean, rel=1e-12)


def test_the_policys_own_advantage_is_zero_in_every_state():
    problem = random_problem(np.random.default_rng(0))
    own_HS = (problem.policy_HSA * advantages(problem.mdp, problem.policy_HSA)).sum(2)
    np.testing.assert_allclose(own_HS, 0, atol=1e-15)


def test_one_decision_by_hand():
    # Reward .9 with probability 1/4 or .1, by a fair coin: .3 and .1.
    mdp = LayeredMDP(
        start_S=np.array([1.0, 0]),
        transitions_HSAS=np.array([[[[0.25, 0.75], [0, 1]], [[1, 0], [1, 0]]]]),
        rewards_S=np.array([0.9, 0.1]),
    )
    policy_HSA = np.full((1, 2, 2), 0.5)
    assert values(mdp, policy_HSA)[0][0, 0].tolist() == pytest.approx([0.3, 0.1])
    assert performance(mdp, policy_HSA) == pytest.approx(0.2)


def test_p_is_dialled_and_values_stay():
    shape = random_shape(np.random.default_rng(0))
    many, few = dialled_chain(shape, 0.4), dialled_chain(shape, 0.1)
    assert many.p == pytest.approx(4 * few.p)
    np.testing.assert_allclose(
        values(many.mdp, many.policy_HSA)[1], values(few.mdp, few.policy_HSA)[1]
    )


def test_p_of_a_chain_by_hand():
    # Right before decision 1, 2, 3 with probability 1, 1/2, 1/4; of them 30 % are improvable.
    shape = ChainShape(num_layers=3, num_improvable=2, num_neutral=3, survival=0.5, effect=0.25)
    problem = dialled_chain(shape, 0.3)
    assert problem.p == pytest.approx(0.3 * 1.75 / 3)
    # The last decision adds .25 to a probability of 1; before it two more, .25 each, must come.
    best_H = advantages(problem.mdp, problem.policy_HSA)[:, :2].max((1, 2))
    assert best_H.tolist() == pytest.approx([0.0625, 0.125, 0.25])
    assert problem.tau == pytest.approx(0.0625)


@pytest.mark.parametrize("seed", range(20))
def test_improvable_states_are_those_where_an_action_gains_tau(seed: int):
    rng = np.random.default_rng(seed)
    for problem in (random_problem(rng), dialled_chain(random_shape(rng), 0.2), trap(0.3)):
        best_HS = advantages(problem.mdp, problem.policy_HSA).max(2)
        rule_HS1 = problem.rule_HS[..., None]
        gained_HS = np.take_along_axis(advantages(problem.mdp, problem.policy_HSA), rule_HS1, 2)
        assert gained_HS[problem.improvable_HS].min() >= problem.tau - 1e-12
        visited_HS = occupancies(problem.mdp, problem.policy_HSA) > 0
        is_improvable_HS = best_HS >= problem.tau - 1e-12
        assert (is_improvable_HS == problem.improvable_HS)[visited_HS].all()

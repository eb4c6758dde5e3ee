"""Draws, what is estimated from them, and exponents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import linregress

from megatron_srpo.theory import cpi, sampling
from megatron_srpo.theory.instances import Problem, dialled_chain, random_problem, random_shape
from megatron_srpo.theory.mdp import advantages, occupancies
from megatron_srpo.theory.slopes import log_log_slope


def rule_advantage(problem: Problem, rule_HS: np.ndarray, from_HS: np.ndarray) -> float:
    weight_HS = occupancies(problem.mdp, problem.policy_HSA) * from_HS
    advantage_HSA = advantages(problem.mdp, problem.policy_HSA)
    chosen_HS = np.take_along_axis(advantage_HSA, rule_HS[..., None], axis=2)[..., 0]
    return float((weight_HS * chosen_HS).sum() / weight_HS.sum())


def estimates(problem: Problem, from_HS: np.ndarray, num_draws: int) -> np.ndarray:
    """Of the rule's advantage, 2000 times."""
    rng = np.random.default_rng(3)
    entries_RHSA = sampling.draw_estimates(problem, from_HS, num_draws, 2000, rng)
    rule_HS1 = problem.rule_HS[..., None]
    return np.take_along_axis(entries_RHSA, rule_HS1[None], axis=3).sum((1, 2, 3))


@pytest.mark.parametrize("oracle", [False, True])
def test_an_estimate_is_unbiased_and_its_variance_at_most_bernsteins(oracle: bool):
    problem = random_problem(np.random.default_rng(5))
    from_HS = problem.improvable_HS if oracle else np.ones_like(problem.improvable_HS)
    found = estimates(problem, from_HS, 400)
    error = found.std() / np.sqrt(len(found))
    truth = rule_advantage(problem, problem.rule_HS, from_HS)
    assert found.mean() == pytest.approx(truth, abs=4 * error)
    assert found.var() <= problem.policy_HSA.shape[2] / 400


def test_random_resets_see_p_times_what_the_oracle_sees():
    problem = dialled_chain(random_shape(np.random.default_rng(0)), 0.25)
    everywhere_HS = np.ones_like(problem.improvable_HS)
    diluted = rule_advantage(problem, problem.rule_HS, everywhere_HS)
    assert diluted == pytest.approx(
        problem.p * rule_advantage(problem, problem.rule_HS, problem.improvable_HS)
    )


def test_the_sufficient_number_of_draws_by_hand():
    # 2 * 3 * (1 + .2/3) * log(2 * 10 / .1) / .01 = 3390.9...
    n = sampling.sufficient_draws(accuracy=0.1, num_actions=3, num_rules=10, failure=0.1)
    assert n == 3391


@pytest.mark.parametrize("oracle", [False, True])
def test_a_sampled_iteration_gains_what_it_is_guaranteed(oracle: bool):
    rng = np.random.default_rng(7)
    for _ in range(100):
        problem = cpi.with_greedy_rule(random_problem(rng))
        rules_NHS = rng.integers(
            problem.policy_HSA.shape[2], size=(8, *problem.improvable_HS.shape)
        )
        rules_NHS[3] = problem.rule_HS
        step = sampling.sampled_step(problem, rules_NHS, oracle=oracle, failure=0.01, rng=rng)
        where = cpi.on_improvable if oracle else cpi.everywhere
        chosen = replace(problem, rule_HS=step.rule_HS)
        assert cpi.gain(chosen, where(problem), step.size) >= step.guarantee
        p, tau, horizon = problem.p, problem.tau, problem.horizon
        closed_form = p * tau**2 / 32 if oracle else p**2 * tau**2 / 16
        assert step.num_draws == sampling.sufficient_draws(
            accuracy=(tau if oracle else p * tau) / 4,
            num_actions=problem.policy_HSA.shape[2],
            num_rules=8,
            failure=0.01,
        )
        assert step.guarantee == pytest.approx(closed_form * horizon / (horizon - 1))
        seen = rule_advantage(chosen, step.rule_HS, where(problem))
        assert seen >= (tau if oracle else p * tau) / 2
        # The estimate less a quarter of tau (p tau) is what the step is made for.
        slack = (tau if oracle else p * tau) / 2
        steepness = (4 if oracle else 2) * (horizon - 1)
        assert (seen - slack) / steepness <= step.size <= seen / steepness


def test_the_oracle_turns_down_one_over_p_less_one_states_for_each_that_it_takes():
    rng = np.random.default_rng(0)
    turned_down = [sampling.rejections(1000, 0.1, rng) for _ in range(500)]
    # Mean n (1-p) / p, standard deviation sqrt(n (1-p)) / p.
    assert np.mean(turned_down) == pytest.approx(9000, abs=4 * 300 / np.sqrt(500))


def test_a_quarter_of_p_costs_random_resets_more_draws_and_the_oracle_none():
    shape = random_shape(np.random.default_rng(4))
    rng = np.random.default_rng(0)
    needed = np.array(
        [
            [
                sampling.draws_needed(problem, rng, oracle=oracle, rate=0.9, repeats=400)
                for problem in (dialled_chain(shape, 0.1), dialled_chain(shape, 0.025))
            ]
            for oracle in (False, True)
        ]
    )
    (of_class, by_type), (oracle_class, oracle_type) = needed[:, 1] / needed[:, 0]
    assert 10 < of_class < 20  # 16 if draws go with 1/p^2
    assert 3 < by_type < 5.3  # 4 if with 1/p
    assert 0.75 < oracle_class < 1.33 and 0.75 < oracle_type < 1.33


def test_a_power_law_has_its_exponent_whatever_the_curves_constants():
    x_CP = np.array([[1, 2, 4, 8], [3, 5, 7, 9]], float)
    slope = log_log_slope(x_CP, np.array([[5], [700]]) * x_CP**-1.5)
    assert [slope.value, slope.low, slope.high] == pytest.approx([-1.5] * 3)


def test_the_interval_of_one_curve_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x = np.arange(1.0, 12)
    y = x**2 * np.exp(0.3 * rng.normal(size=11))
    fit = linregress(np.log(x), np.log(y))
    slope = log_log_slope(x[None], y[None])
    assert slope.value == pytest.approx(fit.slope)
    assert slope.high - slope.value == pytest.approx(2.262157 * fit.stderr)  # t of 9 degrees


def test_the_interval_covers_the_exponent_in_95_of_100_experiments():
    rng = np.random.default_rng(1)
    x_CP = np.tile([0.4, 0.2, 0.1, 0.05], (5, 1))
    covered = 0
    for _ in range(2000):
        noise_CP = rng.normal(size=(5, 4)) + 10 * rng.normal(size=(5, 1))
        slope = log_log_slope(x_CP, x_CP * np.exp(noise_CP))
        covered += slope.low <= 1 <= slope.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)

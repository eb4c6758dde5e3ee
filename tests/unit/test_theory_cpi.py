"""Guaranteed gains against exact ones, on MDPs that are kind and on one that is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_srpo.theory import cpi
from megatron_srpo.theory.cpi import Method, everywhere, on_improvable
from megatron_srpo.theory.instances import (
    ChainShape,
    Problem,
    dialled_chain,
    random_problem,
    random_shape,
    trap,
)

METHODS = [everywhere, on_improvable]


def problems(num: int) -> list[Problem]:
    rng = np.random.default_rng(1)
    return [random_problem(rng) for _ in range(num)]


def shortfalls(where: Method, share_of_step: float, *, penalized: bool = True) -> int:
    """How often the gain is less than the bound says, of 300 MDPs."""
    count = 0
    for problem in problems(300):
        mixed_HS = where(problem)
        bound = cpi.bound(problem, mixed_HS)
        size = share_of_step * bound.size
        promised = bound.gain(size) if penalized else size * bound.advantage
        count += cpi.gain(problem, mixed_HS, size) < promised - 1e-12
    return count


@pytest.mark.parametrize("where", METHODS)
@pytest.mark.parametrize("share_of_step", [1.0, 0.3])
def test_a_step_gains_what_is_guaranteed(where: Method, share_of_step: float):
    assert shortfalls(where, share_of_step) == 0


@pytest.mark.parametrize("where", METHODS)
def test_without_its_penalty_the_bound_is_wrong(where: Method):
    assert shortfalls(where, 1.0, penalized=False) > 50


@pytest.mark.parametrize("size", [0.1, 0.25, 0.6, 1.0])
def test_the_guarantee_is_attained_where_the_rule_is_wrong_off_the_policys_path(size: float):
    # By hand: a [(1-a) 1/2 - a 1/2]: both decisions deviate, the second is right or in the trap.
    problem = trap(1.0)
    mixed_HS = everywhere(problem)
    assert cpi.gain(problem, mixed_HS, size) == pytest.approx(size / 2 - size**2)
    assert cpi.bound(problem, mixed_HS).gain(size) == pytest.approx(size / 2 - size**2)


def test_three_times_the_prescribed_step_loses_in_the_trap():
    problem = trap(1.0)
    mixed_HS = everywhere(problem)
    bound = cpi.bound(problem, mixed_HS)
    assert bound.size == pytest.approx(0.25)
    assert cpi.gain(problem, mixed_HS, bound.size) == pytest.approx(bound.gain(bound.size))
    assert cpi.gain(problem, mixed_HS, 3 * bound.size) < 0 < bound.gain(bound.size)


def test_the_terms_of_a_bound_by_hand():
    # Right and improvable before decisions 1 to 3: .3 of 1, 1/2, 1/4; the rule adds 1/16, 1/8, 1/4.
    shape = ChainShape(num_layers=3, num_improvable=2, num_neutral=3, survival=0.5, effect=0.25)
    problem = dialled_chain(shape, 0.3)
    backwards = replace(problem, rule_HS=1 - problem.rule_HS)
    for of, sign in ((problem, 1), (backwards, -1)):
        for where, shift in ((everywhere, 2 + 1), (on_improvable, 2 * 0.3 + 0.15)):
            bound = cpi.bound(of, where(of))
            assert bound.advantage == pytest.approx(sign * 3 * 0.3 / 16)
            assert bound.largest == pytest.approx(0.25)
            assert bound.shift == pytest.approx(shift)


def test_the_prescribed_step_has_the_largest_guarantee():
    for problem in problems(50):
        bound = cpi.bound(problem, everywhere(problem))
        sizes = np.linspace(0, 1, 1001)
        assert bound.gain(bound.size) >= max(bound.gain(size) for size in sizes) - 1e-15


def test_guarantees_are_at_least_the_closed_forms_in_p_and_tau():
    for problem in map(cpi.with_greedy_rule, problems(300)):
        p, tau = problem.p, problem.tau
        rr, caro = (cpi.bound(problem, where(problem)) for where in METHODS)
        assert rr.gain(rr.size) >= p**2 * tau**2 / (4 * rr.largest)
        assert caro.gain(caro.size) >= p * tau**2 / (8 * caro.largest)


def test_a_rule_that_is_nowhere_worse_gains_of_the_order_of_p_with_random_resets():
    for problem in map(cpi.with_greedy_rule, problems(300)):
        size = 1 / problem.horizon
        bound = cpi.bound(problem, everywhere(problem))
        gained = cpi.gain(problem, everywhere(problem), size)
        assert gained >= bound.gain_if_nowhere_worse(size, problem.horizon) - 1e-12
        assert gained >= problem.p * problem.tau / np.e
        assert cpi.gain(problem, on_improvable(problem), 1.0) >= problem.p * problem.tau - 1e-12


def test_the_bound_of_a_rule_that_is_nowhere_worse_by_hand():
    bound = cpi.Bound(advantage=0.8, largest=1.0, shift=3.0)
    assert bound.gain_if_nowhere_worse(0.5, 3) == pytest.approx(0.5 * 0.25 * 0.8)


def test_that_bound_is_wrong_for_a_rule_that_is_worse_somewhere():
    problem = trap(0.1)
    bound = cpi.bound(problem, everywhere(problem))
    assert cpi.gain(problem, everywhere(problem), 0.5) < bound.gain_if_nowhere_worse(0.5, 2)


def test_a_line_search_finds_the_maximum_of_a_parabola():
    # a p/2 - a^2 (1+p)/2 with p = .4: largest at a = p / 2(1+p).
    problem = trap(0.4)
    assert cpi.line_search(problem, everywhere(problem)) == pytest.approx(0.4**2 / (8 * 1.4))


def test_halving_p_quarters_one_guarantee_and_halves_the_other():
    shape = random_shape(np.random.default_rng(2))
    ratios = []
    for where in METHODS:
        many, few = (
            cpi.bound(problem, where(problem))
            for problem in (dialled_chain(shape, 0.2), dialled_chain(shape, 0.1))
        )
        ratios.append(many.gain(many.size) / few.gain(few.size))
    assert ratios == pytest.approx([4, 2])


def test_a_rule_without_advantage_is_not_stepped_to():
    assert cpi.Bound(advantage=-0.1, largest=0.2, shift=1.0).size == 0

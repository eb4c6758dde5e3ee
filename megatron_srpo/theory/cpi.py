"""How far may a policy step towards a rule?   problem, states -> step size, guaranteed gain

Conservative policy iteration (Kakade & Langford 2002) with a finite horizon. The bounds are our
own, made for this file; the constants of arXiv 2605.25507 were not seen. Claim 1 there: an
iteration gains of the order of p^2 with random resets (CPI-RR), of p with the oracle's (CPI-CARO).

On the states M the new policy follows pi' with probability a, else pi. Let g(x) = A(x, pi'(x)),
eps = max_M |g|, G = sum_h E_d_h[g 1_M], and W = sum_h (H - 1 - h) d_h(M), h from 0.

1. J(new) - J = a sum_h E_d^new_h[g 1_M]: the performance difference, as A(x, pi) = 0.
2. Until the new policy first deviates it visits what pi visits. It has deviated before layer h
   with probability at most a sum_{k<h} d_k(M), and then g 1_M is off by 2 eps at most. Hence
       J(new) - J >= a G - 2 a^2 eps W,
   which is largest for a = min(1, G / (4 eps W)): G^2 / (8 eps W) if a < 1.
3. CPI-RR, M everything: W = H (H-1) / 2, so the guarantee is G^2 / (4 eps H (H-1)). With
   G >= H p tau it is at least p^2 tau^2 / (4 eps).
4. CPI-CARO, M = S with g >= tau on S: G >= H p tau and W <= (H-1) H p, so it is at least
   p tau^2 / (8 eps). The penalty itself has the factor p: a longer step is allowed.
5. If pi' is nowhere worse than pi (g >= 0), what the new policy gains where it has deviated is no
   loss, and without W: J(new) - J >= a (1-a)^(H-1) G. With a = 1/H CPI-RR is guaranteed
   G / (e H) >= p tau / e, and CPI-CARO with a = 1 gains p tau: both of the order of p. So p^2 is
   the price of a rule that may be wrong somewhere, not of random resets as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar

from megatron_srpo.theory.instances import Problem
from megatron_srpo.theory.mdp import Bools, Reals, advantages, occupancies, performance

Method = Callable[[Problem], Bools]
"""Where the policy is mixed with the rule, [H, S]."""


def everywhere(problem: Problem) -> Bools:
    """CPI-RR: random resets do not know where the policy can be improved."""
    return np.ones_like(problem.improvable_HS)


def on_improvable(problem: Problem) -> Bools:
    """CPI-CARO: the oracle resets to improvable states alone."""
    return problem.improvable_HS


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The terms of step 2 above, for one set of states."""

    advantage: float
    """G."""
    largest: float
    """eps."""
    shift: float
    """W."""

    @property
    def size(self) -> float:
        """The prescribed step; 0 if the rule's advantage is not positive."""
        if self.advantage <= 0:
            return 0.0
        steepness = 4 * self.largest * self.shift
        return 1.0 if steepness <= self.advantage else self.advantage / steepness

    def gain(self, size: float) -> float:
        """What a step of this size gains at least."""
        return size * self.advantage - 2 * size**2 * self.largest * self.shift

    def gain_if_nowhere_worse(self, size: float, horizon: int) -> float:
        """The same for a rule whose advantage is nowhere negative (step 5)."""
        return size * (1 - size) ** (horizon - 1) * self.advantage


def bound(problem: Problem, mixed_HS: Bools) -> Bound:
    """G, eps and W of a step on these states."""
    occupancy_HS = occupancies(problem.mdp, problem.policy_HSA) * mixed_HS
    rule_HS1 = problem.rule_HS[:, :, None]
    advantage_HSA = advantages(problem.mdp, problem.policy_HSA)
    g_HS = np.take_along_axis(advantage_HSA, rule_HS1, axis=2)[:, :, 0]
    later_H = np.arange(problem.horizon)[::-1]
    return Bound(
        advantage=float((occupancy_HS * g_HS).sum()),
        largest=float(np.abs(g_HS[mixed_HS]).max()),
        shift=float(later_H @ occupancy_HS.sum(1)),
    )


def with_greedy_rule(problem: Problem) -> Problem:
    """The same, stepping towards the best action of every state: nowhere worse than the policy."""
    advantage_HSA = advantages(problem.mdp, problem.policy_HSA)
    return replace(problem, rule_HS=advantage_HSA.argmax(2))


def mixture(problem: Problem, mixed_HS: Bools, size: float) -> Reals:
    """(1 - a) pi + a pi' on these states, pi elsewhere: [H, S, A]."""
    rule_HSA = np.eye(problem.policy_HSA.shape[2])[problem.rule_HS]
    size_HS1 = size * mixed_HS[:, :, None]
    return (1 - size_HS1) * problem.policy_HSA + size_HS1 * rule_HSA


def gain(problem: Problem, mixed_HS: Bools, size: float) -> float:
    """J(new) - J, exactly."""
    new_HSA = mixture(problem, mixed_HS, size)
    return performance(problem.mdp, new_HSA) - performance(problem.mdp, problem.policy_HSA)


def line_search(problem: Problem, mixed_HS: Bools) -> float:
    """The largest gain of all step sizes: what a method that knew the outcome would do."""
    sizes = np.linspace(0, 1, 101)
    gains = [gain(problem, mixed_HS, size) for size in sizes]
    best = int(np.argmax(gains))
    around = (sizes[max(best - 1, 0)], sizes[min(best + 1, 100)])
    found = minimize_scalar(lambda a: -gain(problem, mixed_HS, a), bounds=around, method="bounded")
    return max(gains[best], -float(found.fun))

"""How many resets until the right rule is chosen?   problem, states -> draws, and a sampled step

A draw: reset to a state that the policy visits (CPI-RR) or to an improvable one among those
(CPI-CARO), a uniformly random action, one continuation by the policy, reward 0 or 1. A rule's
advantage is estimated by the mean of |A| 1[action = pi'(x)] (reward - V(x)); V is known, for both
methods alike. Claim 2 of arXiv 2605.25507: CPI-RR needs 1/p^2 times as many draws.

By Bernstein's inequality (terms of size at most 2|A| about their mean, variance at most |A|) N
rules are all estimated within t, except with probability delta, from
    n >= 2 |A| (1 + 2t/3) log(2N / delta) / t^2
draws. CPI-RR must tell p tau from 0, CPI-CARO tau: t = p tau / 4 and tau / 4. The rule that looks
best has then, by its estimate less t, an advantage of p tau / 2 (tau / 2) at least, and the step
for that (cpi.py; eps <= 1, W = H(H-1)/2 and W <= (H-1) H p) is guaranteed
    H p^2 tau^2 / (16 (H-1))   and   H p tau^2 / (32 (H-1)).
The oracle's states have to be found: n / p visited states on average, counted apart.

Legend: R repetitions, N rules, H, S, A as in mdp.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_srpo.theory.cpi import Bound
from megatron_srpo.theory.instances import Problem
from megatron_srpo.theory.mdp import Bools, Ints, Reals, occupancies, values


def sufficient_draws(*, accuracy: float, num_actions: int, num_rules: int, failure: float) -> int:
    """Bernstein's n, above."""
    per_square = 2 * num_actions * (1 + 2 * accuracy / 3) * math.log(2 * num_rules / failure)
    return math.ceil(per_square / accuracy**2)


def draw_estimates(
    problem: Problem, from_HS: Bools, num_draws: int, repeats: int, rng: np.random.Generator
) -> Reals:
    """Mean of |A| (reward - V) over all draws that met state and action, [R, H, S, A].

    A rule's estimate is the sum of its own entries. Draws are counted, not listed: a multinomial
    over states and actions, then a binomial for the rewards, so that 10^9 of them cost nothing.
    """
    weight_HS = occupancies(problem.mdp, problem.policy_HSA) * from_HS
    q_HSA, value_HS = values(problem.mdp, problem.policy_HSA)
    num_actions = q_HSA.shape[2]
    weight_HSA = np.repeat((weight_HS / weight_HS.sum())[:, :, None] / num_actions, num_actions, 2)
    counts = rng.multinomial(num_draws, weight_HSA.ravel(), size=repeats)
    counts_RHSA = counts.reshape(repeats, *q_HSA.shape)
    right_RHSA = rng.binomial(counts_RHSA, np.clip(q_HSA, 0, 1))
    return num_actions / num_draws * (right_RHSA - counts_RHSA * value_HS[:, :, None])


def rejections(num_draws: int, p: float, rng: np.random.Generator) -> int:
    """Visited states that the oracle turns down before it has seen `num_draws` improvable ones."""
    return int(rng.negative_binomial(num_draws, p))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """What a method does that sees draws only, and what it is guaranteed."""

    rule_HS: Ints
    size: float
    guarantee: float
    """The gain, except with probability `failure`."""
    num_draws: int


def sampled_step(
    problem: Problem, rules_NHS: Ints, *, oracle: bool, failure: float, rng: np.random.Generator
) -> SampledStep:
    """CPI-RR, or with the oracle CPI-CARO. p and tau are known; one of the rules must be as good
    as they say (`problem.rule_HS`, where that is greedy)."""
    horizon, p = problem.horizon, problem.p
    from_HS = problem.improvable_HS if oracle else np.ones_like(problem.improvable_HS)
    target = problem.tau if oracle else p * problem.tau
    accuracy = target / 4
    num_draws = sufficient_draws(
        accuracy=accuracy,
        num_actions=problem.policy_HSA.shape[2],
        num_rules=len(rules_NHS),
        failure=failure,
    )
    (estimate_HSA,) = draw_estimates(problem, from_HS, num_draws, 1, rng)
    chosen_NHS = np.take_along_axis(estimate_HSA[None], rules_NHS[..., None], axis=3)[..., 0]
    score_N = chosen_NHS.sum((1, 2))
    best = int(score_N.argmax())
    visits = horizon * p if oracle else horizon
    shift = (horizon - 1) * (visits if oracle else visits / 2)
    seen, worst = (
        Bound(advantage=visits * advantage, largest=1.0, shift=shift)
        for advantage in (float(score_N[best]) - accuracy, target / 2)
    )
    return SampledStep(
        rule_HS=rules_NHS[best],
        size=seen.size,
        guarantee=worst.gain(worst.size),
        num_draws=num_draws,
    )


def success_rate(
    problem: Problem, num_draws: int, repeats: int, rng: np.random.Generator, *, oracle: bool
) -> tuple[float, float]:
    """On a chain: how often the chosen rule has at least 3/4 of the best one's advantage on S.

    First: chosen from 64 rules on types of states, drawn anew each time, one of them the best.
    Second: type by type, the action that looks better.
    """
    from_HS = problem.improvable_HS if oracle else np.ones_like(problem.improvable_HS)
    estimate_RSA = draw_estimates(problem, from_HS, num_draws, repeats, rng).sum(1)
    num_states = estimate_RSA.shape[1]
    rules_RNS = rng.integers(0, 2, (repeats, 64, num_states))
    rules_RNS[:, 0] = problem.rule_HS[0]
    scores_RN = np.take_along_axis(estimate_RSA[:, None], rules_RNS[..., None], axis=3).sum((2, 3))
    of_class_RS = rules_RNS[np.arange(repeats), scores_RN.argmax(1)]
    is_type_S = problem.improvable_HS[0]
    of_class, by_type = (
        float((2 * rule_RS[:, is_type_S].mean(1) - 1 >= 0.75).mean())
        for rule_RS in (of_class_RS, estimate_RSA.argmax(2))
    )
    return of_class, by_type


def draws_needed(
    problem: Problem, rng: np.random.Generator, *, oracle: bool, rate: float, repeats: int
) -> tuple[float, float]:
    """Draws until the success rates reach `rate`; between powers of two, log-linear."""
    needed = [math.nan, math.nan]
    before, num_draws = (0.0, 0.0), 16
    while any(map(math.isnan, needed)):
        now = success_rate(problem, num_draws, repeats, rng, oracle=oracle)
        for way in range(2):
            if math.isnan(needed[way]) and now[way] >= rate:
                missing = (now[way] - rate) / max(now[way] - before[way], 1e-9)
                needed[way] = num_draws / 2 ** min(missing, 1.0)
        before, num_draws = now, 2 * num_draws
    return needed[0], needed[1]

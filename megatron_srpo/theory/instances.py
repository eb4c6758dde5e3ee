"""Which MDPs are the bounds tried on?   random ones; chains whose p is dialled; a trap

A problem is what one step of conservative policy iteration is given. An improvable state is one
with an action whose advantage is at least tau; p, the policy's share of time in them, is
(1/H) sum_h d_h(S). The paper's own definition of p was not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_srpo.theory.mdp import Bools, Ints, LayeredMDP, Reals, advantages, occupancies

IMPROVABLE, NEUTRAL, TRAP = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A policy, and a rule that it may step towards."""

    mdp: LayeredMDP
    policy_HSA: Reals
    rule_HS: Ints
    """pi': an action for each state. Greedy on the improvable states."""
    improvable_HS: Bools
    """S: the states to which the oracle resets."""
    tau: float
    """Least advantage of the rule on S."""

    @property
    def horizon(self) -> int:
        """H."""
        return len(self.policy_HSA)

    @property
    def p(self) -> float:
        """Share of the policy's time in improvable states."""
        occupancy_HS = occupancies(self.mdp, self.policy_HSA)
        return float(occupancy_HS[self.improvable_HS].sum()) / self.horizon


def random_problem(rng: np.random.Generator) -> Problem:
    """2 to 7 layers, 3 to 11 states, 2 to 5 actions; 3 to 50 % of all states are improvable.

    Off S the rule is as bad as it can be at a share of states between none and all, those that the
    policy visits least first: a rule fitted to the policy's own states is wrong elsewhere.
    """
    num_layers, num_states, num_actions = rng.integers((2, 3, 2), (8, 12, 6))
    by_state = (num_layers, num_states, num_actions)
    mdp = LayeredMDP(
        start_S=rng.dirichlet(np.full(num_states, 0.3)),
        transitions_HSAS=rng.dirichlet(np.full(num_states, 0.3), size=by_state),
        rewards_S=rng.random(num_states) ** 3,
    )
    policy_HSA = rng.dirichlet(np.ones(num_actions), size=by_state[:2])
    advantage_HSA = advantages(mdp, policy_HSA)
    best_HS = advantage_HSA.max(2)
    tau = float(np.quantile(best_HS, 1 - rng.uniform(0.03, 0.5)))
    improvable_HS = best_HS >= tau
    occupancy_HS = occupancies(mdp, policy_HSA)
    is_wrong_HS = ~improvable_HS & (occupancy_HS <= np.quantile(occupancy_HS, rng.random()))
    rule_HS = np.where(is_wrong_HS, advantage_HSA.argmin(2), advantage_HSA.argmax(2))
    return Problem(
        mdp=mdp, policy_HSA=policy_HSA, rule_HS=rule_HS, improvable_HS=improvable_HS, tau=tau
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainShape:
    """What stays the same while p is dialled."""

    num_layers: int
    num_improvable: int
    """Types of states in which the action matters: the first states of a layer."""
    num_neutral: int
    """Types in which it does not."""
    survival: float
    """Probability to be still right after a decision of the uniform policy, in any state."""
    effect: float
    """What action 1 adds to it in an improvable state, and action 0 takes away."""


def random_shape(rng: np.random.Generator) -> ChainShape:
    """A chain of 3 to 6 decisions."""
    survival = rng.uniform(0.6, 0.85)
    return ChainShape(
        num_layers=int(rng.integers(3, 7)),
        num_improvable=int(rng.integers(3, 6)),
        num_neutral=int(rng.integers(8, 14)),
        survival=survival,
        effect=rng.uniform(0.5, 1) * (1 - survival),
    )


def dialled_chain(shape: ChainShape, share: float) -> Problem:
    """A thought after the other, each state's type drawn anew; the last state: already wrong.

    A right chain meets an improvable state with probability `share`. Values under the uniform
    policy do not depend on it, so that p changes and nothing else does. The rule takes action 1.
    """
    num_types = shape.num_improvable + shape.num_neutral
    wrong = num_types
    types_S = np.zeros(num_types + 1)
    types_S[: shape.num_improvable] = share / shape.num_improvable
    types_S[shape.num_improvable : wrong] = (1 - share) / shape.num_neutral
    survival_SA = np.full((num_types + 1, 2), shape.survival)
    survival_SA[: shape.num_improvable] += np.array([-shape.effect, shape.effect])
    survival_SA[wrong] = 0
    step_SAS = survival_SA[:, :, None] * types_S
    step_SAS[:, :, wrong] = 1 - survival_SA
    improvable_HS = np.zeros((shape.num_layers, num_types + 1), bool)
    improvable_HS[:, : shape.num_improvable] = True
    return Problem(
        mdp=LayeredMDP(
            start_S=types_S,
            transitions_HSAS=np.broadcast_to(step_SAS, (shape.num_layers, *step_SAS.shape)),
            rewards_S=np.r_[np.ones(num_types), 0.0],
        ),
        policy_HSA=np.full((shape.num_layers, num_types + 1, 2), 0.5),
        rule_HS=np.ones((shape.num_layers, num_types + 1), np.int64),
        improvable_HS=improvable_HS,
        tau=shape.effect * shape.survival ** (shape.num_layers - 1),
    )


def trap(share: float) -> Problem:
    """Two decisions; the rule leads where the policy never was, and is wrong there.

    The policy goes on (action 0) to an improvable state with probability `share`, else to a neutral
    one, and is right half of the time. The rule makes the improvable state certain, but its own
    first action leads to the trap, where the policy is right half of the time and the rule never.
    With share 1 the guarantee of a step everywhere is attained for any size.
    """
    move_SAS = np.zeros((3, 2, 3))
    move_SAS[:, 0, [IMPROVABLE, NEUTRAL]] = share, 1 - share
    move_SAS[:, 1, TRAP] = 1
    right_SA = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    """The last decision leads to state 0, with reward 1, or to state 1, with none."""
    end_SAS = np.stack([right_SA, 1 - right_SA, np.zeros((3, 2))], axis=2)
    policy_HSA = np.full((2, 3, 2), 0.5)
    policy_HSA[0] = [1, 0]
    improvable_HS = np.zeros((2, 3), bool)
    improvable_HS[1, IMPROVABLE] = True
    return Problem(
        mdp=LayeredMDP(
            start_S=np.array([1.0, 0, 0]),
            transitions_HSAS=np.stack([move_SAS, end_SAS]),
            rewards_S=np.array([1.0, 0, 0]),
        ),
        policy_HSA=policy_HSA,
        rule_HS=np.ones((2, 3), np.int64),
        improvable_HS=improvable_HS,
        tau=0.5,
    )

"""What is a policy worth in a small layered MDP?   MDP, policy -> values, advantages, occupancies

Exact, by dynamic programming. Legend: H layers of one decision each, S states of a layer, A
actions. As a chain of thought has it, there is one reward, after the last decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayeredMDP:
    """Finite horizon; the same states in each layer, to be read as different ones."""

    start_S: Reals
    """Probability of the first state."""
    transitions_HSAS: Reals
    """Probability of the next layer's state."""
    rewards_S: Reals
    """Mean reward, in [0, 1], of where the last decision leads."""


def values(mdp: LayeredMDP, policy_HSA: Reals) -> tuple[Reals, Reals]:
    """Q [H, S, A] and V [H, S] of the policy."""
    q_HSA = np.empty_like(policy_HSA)
    value_HS = np.empty(policy_HSA.shape[:2])
    next_S = mdp.rewards_S
    for layer in reversed(range(len(policy_HSA))):
        q_HSA[layer] = mdp.transitions_HSAS[layer] @ next_S
        next_S = value_HS[layer] = (policy_HSA[layer] * q_HSA[layer]).sum(1)
    return q_HSA, value_HS


def advantages(mdp: LayeredMDP, policy_HSA: Reals) -> Reals:
    """A(x, a) = Q(x, a) - V(x), [H, S, A]."""
    q_HSA, value_HS = values(mdp, policy_HSA)
    return q_HSA - value_HS[:, :, None]


def occupancies(mdp: LayeredMDP, policy_HSA: Reals) -> Reals:
    """d_h(x): how likely the policy is in state x in layer h, [H, S]; each layer sums to 1."""
    layers = [mdp.start_S]
    for policy_SA, transitions_SAS in zip(policy_HSA, mdp.transitions_HSAS, strict=True):
        layers.append(np.einsum("s,sa,sat->t", layers[-1], policy_SA, transitions_SAS))
    return np.stack(layers[:-1])


def performance(mdp: LayeredMDP, policy_HSA: Reals) -> float:
    """J: the mean reward."""
    return float(mdp.start_S @ values(mdp, policy_HSA)[1][0])

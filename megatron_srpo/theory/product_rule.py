"""Which objective does a reset's credit climb?   small softmax policies, all paths enumerated

Let z be a prefix, one on every path. Then V(x) = sum_z pi(z) V(z), and

    grad V(x) = sum_z pi(z) [ V(z) grad log pi(z) + grad V(z) ].

A reset draws z from q: a response fails, and a localizer says where to cut it. Credit whose
baseline does not depend on what is weighted, and whose scale is constant, has the mean

    masked prefix (the paper)          sum_z q(z) grad V(z)
    chain: prefix weighted by r'       sum_z q(z) [ V(z) grad log pi(z) + grad V(z) ]
    whole path, reward less b          sum_z q(z) [ (V(z) - b) grad log pi(z) + grad V(z) ]

Chain credit's is the gradient of sum_z w(z) pi(z) V(z), w = q/pi held fixed; in other words each
right path y counts c(y) = sum of w over its prefixes, instead of once. With one right path all
terms are multiples of grad V(x): a prefix off it has V = 0, one on it has pi(z) V(z) = V(x). So
chain credit is parallel to the gradient, by sum_z q(z)/pi(z) over the path's prefixes, wherever the
localizer cuts. With several it is not, and may point away from the gradient: a prefix that fails
often is reset to often, and is made more likely although another way would be better. The masked
prefix errs otherwise. Where each prefix has logits of its own, it has no wrong sign: grad V(z) is
there, entry by entry, a multiple of grad V(x). But it teaches nothing about how to get to z.
A baseline on a prefix is not neutral: z was selected, so E_q[grad log pi(z)] is not 0.

Not in it: mean and deviation of a small group, which depend on the rewards that they normalise.
Legend: H decisions, A actions, Y = A^H paths in itertools' order, Z = A^h prefixes of h actions,
D parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_srpo.theory.mdp import Reals


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """A prompt and its policy: which paths are right, and logits for what follows a prefix."""

    logits: tuple[Reals, ...]
    """For each of H decisions [rows, A]: prefix number i uses row i modulo rows. A^h rows: logits
    of its own for each prefix; A rows: by the last action; one: by position."""
    rewards_Y: Reals
    """0 or 1."""

    @property
    def num_actions(self) -> int:
        """A."""
        return self.logits[0].shape[1]

    def num_prefixes(self, depth: int) -> int:
        """Z = A^depth."""
        return self.num_actions**depth

    def by_prefix(self, values_Y: Reals, depth: int) -> Reals:
        """Of all paths, grouped by their first `depth` actions: [Z, paths of a prefix]."""
        return values_Y.reshape(self.num_prefixes(depth), -1)


Localizer = Callable[[Paths], Reals]
"""How likely a failed path is cut before its decision h: [Y, H]."""


def random_paths(
    rng: np.random.Generator,
    *,
    horizon: int,
    num_actions: int,
    num_right: int,
    own_logits: bool,
    skill: float = 0.0,
) -> Paths:
    """Standard normal logits; `num_right` paths, drawn without replacement, have reward 1.

    `skill` is added to the logit of each decision of a right path. Logits are a prefix's own, or
    shared by prefixes of one length with the same last action.
    """
    num_paths = num_actions**horizon
    right = rng.choice(num_paths, num_right, replace=False)
    logits: list[Reals] = []
    for depth in range(horizon):
        num_rows = num_actions ** (depth if own_logits else min(depth, 1))
        logits.append(rng.normal(size=(num_rows, num_actions)))
        prefix, action = divmod(right // num_actions ** (horizon - depth - 1), num_actions)
        is_right = np.zeros((num_rows, num_actions))
        is_right[prefix % num_rows, action] = 1
        logits[-1] += skill * is_right
    rewards_Y = np.zeros(num_paths)
    rewards_Y[right] = 1
    return Paths(logits=tuple(logits), rewards_Y=rewards_Y)


def extended(paths: Paths, start: int, end: int) -> tuple[Reals, Reals]:
    """Decisions `start` to `end` after each prefix of `start` actions: probability of what they
    choose, [A^end], and gradient of its logarithm, [A^end, D]."""
    sizes = [logits.size for logits in paths.logits]
    probability = np.ones(paths.num_prefixes(start))
    score = np.zeros((len(probability), sum(sizes)))
    for depth in range(start, end):
        logits = paths.logits[depth]
        row_Z = np.arange(len(probability)) % len(logits)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        policy_ZA = (odds / odds.sum(1, keepdims=True))[row_Z]
        num_actions = policy_ZA.shape[1]
        step_ZAA = np.eye(num_actions) - policy_ZA[:, None]
        score = np.repeat(score, num_actions, 0)
        first = sum(sizes[:depth]) + np.repeat(row_Z, num_actions) * num_actions
        columns = first[:, None] + np.arange(num_actions)
        score[np.arange(len(score))[:, None], columns] += step_ZAA.reshape(-1, num_actions)
        probability = (probability[:, None] * policy_ZA).ravel()
    return probability, score


def value(paths: Paths, depth: int) -> tuple[Reals, Reals]:
    """V(z) [Z] and grad V(z) [Z, D] of all prefixes, from what follows them alone."""
    probability_Y, score_YD = extended(paths, depth, len(paths.logits))
    right_Y = probability_Y * paths.rewards_Y
    by_prefix = (paths.num_prefixes(depth), -1, score_YD.shape[1])
    gradient_ZD = (right_Y[:, None] * score_YD).reshape(by_prefix).sum(1)
    return paths.by_prefix(right_Y, depth).sum(1), gradient_ZD


def exact_gradient(paths: Paths) -> Reals:
    """grad V(x), [D]: the mean of GRPO, whatever its baseline."""
    return value(paths, 0)[1][0]


def of_prefixes(paths: Paths, depth: int) -> Reals:
    """sum_z pi(z) [ V(z) grad log pi(z) + grad V(z) ] over all prefixes of one length, [D]."""
    probability_Z, score_ZD = extended(paths, 0, depth)
    value_Z, gradient_ZD = value(paths, depth)
    return probability_Z @ (value_Z[:, None] * score_ZD + gradient_ZD)


def first_wrong(paths: Paths) -> Reals:
    """Before the first decision after which no right path is left: a perfect localizer."""
    num_left_YH = np.stack(
        [
            np.repeat(left_Z, len(paths.rewards_Y) // len(left_Z))
            for depth in range(1, len(paths.logits) + 1)
            for left_Z in [paths.by_prefix(paths.rewards_Y, depth).sum(1)]
        ],
        axis=1,
    )
    return np.eye(len(paths.logits))[(num_left_YH == 0).argmax(1)]


def anywhere(paths: Paths) -> Reals:
    """Uniformly random resets (RRPO)."""
    return np.full((len(paths.rewards_Y), len(paths.logits)), 1 / len(paths.logits))


def reset_distribution(paths: Paths, localizer: Localizer) -> list[Reals]:
    """q(z), for each depth below H: a path given that it failed, cut by the localizer."""
    probability_Y, _ = extended(paths, 0, len(paths.logits))
    failed_Y = probability_Y * (1 - paths.rewards_Y)
    cut_YH = localizer(paths) * (failed_Y / failed_Y.sum())[:, None]
    return [paths.by_prefix(cut_YH[:, h], h).sum(1) for h in range(len(paths.logits))]


def mean_credit(
    paths: Paths, localizer: Localizer, *, prefix: float, baseline: float = 0.0
) -> Reals:
    """sum_z q(z) [ prefix (V(z) - baseline) grad log pi(z) + grad V(z) ], [D]."""
    total = np.zeros(sum(logits.size for logits in paths.logits))
    for depth, q_Z in enumerate(reset_distribution(paths, localizer)):
        value_Z, gradient_ZD = value(paths, depth)
        _, score_ZD = extended(paths, 0, depth)
        total += q_Z @ (prefix * (value_Z - baseline)[:, None] * score_ZD + gradient_ZD)
    return total


def path_weights(paths: Paths, localizer: Localizer) -> Reals:
    """c(y), [Y]: how often chain credit counts a path that counts once in V(x)."""
    weight_Y = np.zeros(len(paths.rewards_Y))
    for depth, q_Z in enumerate(reset_distribution(paths, localizer)):
        probability_Z, _ = extended(paths, 0, depth)
        weight_Y += np.repeat(q_Z / probability_Z, len(weight_Y) // len(q_Z))
    return weight_Y


def cosine(one: Reals, other: Reals) -> float:
    """Of the angle between two gradients; 0 if one of them is 0."""
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms) if norms > 0 else 0.0

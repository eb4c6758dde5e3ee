"""Do resets pay here?   groups -> sums; metrics -> predicted gain over GRPO, a verdict

Take a chain of thoughts that all must be right. V is the pass rate from prompts, W that from reset
states, of what is generated in a step. In a group whose rewards are divided by their spread, a
rollout's gradient is as long as the square root of its odds, o(p) = p / (1 - p), on the tokens that
are credited, and its noise has a power of 1 on those that it sampled (docs/algorithm.md has the
derivation). With a share f of suffixes, of whose tokens a share u is their own,

    signal = (1 - f) sqrt(o(V)) + f s sqrt(o(W))
    noise  = (1 - f) + f u
    predicted gain = signal^2 / (noise o(V)) / cost

with s = u where copied prefixes are masked, s = u + prefix_weight (1 - u) in chain credit, and as
cost the generated tokens of all kinds over those of as many fresh rollouts. It is how many times
GRPO's tokens would be needed for the same signal to noise. Left out: groups whose rewards all
agree, where in a response the credit falls, and how prompts differ. docs/claims.md says how far it
is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_srpo.config_method import CreditConfig
from megatron_srpo.types import Group

PAYOFF = "payoff/"
"""Begins the metrics' names."""
FRESH, RESET = f"{PAYOFF}fresh_pass_rate", f"{PAYOFF}reset_pass_rate"
SUFFIXES, OWN, CREDITED = f"{PAYOFF}suffix_rate", f"{PAYOFF}own_share", f"{PAYOFF}credited_share"
TOKENS, LENGTH = f"{PAYOFF}cost_mean", f"{PAYOFF}length_mean"
"""Tokens: generated of all kinds, for a rollout that is trained; of a fresh rollout alone."""
LAST = 10
"""Steps that a verdict looks at."""
SURE = 0.98
"""The highest pass rate that odds are taken of: beyond, they hang on single wrong rollouts."""
PAYS, COSTS = 1.1, 0.9
"""Predicted gains between these are no difference worth a word."""
POLISHING = 0.9
"""Pass rate from which on there is little left to find by going back."""


def payoff_sums(groups: Sequence[Group], credit: CreditConfig) -> dict[str, tuple[float, float]]:
    """Numerators and denominators of what the rule asks for; those without any are left out.

    Fresh rollouts count whether they are trained or not: a base without its failed seed passes more
    often than the policy.
    """
    everybody = [r for group in groups for r in group.rollouts]
    fresh = [r for r in everybody if not r.num_copied]
    trained = [r for group in groups if group.use == "train" for r in group.rollouts]
    suffixes = [r for r in trained if r.num_copied]
    weight = credit.prefix_weight if credit.rule == "chain" else 0.0
    own = sum(1 - r.num_copied / len(r.token_ids) for r in suffixes)
    tokens = sum(len(r.token_ids) - r.num_copied for r in everybody)
    tokens += sum(reset.num_tokens for group in groups for reset in group.resets)
    sums = {
        SUFFIXES: (len(suffixes), len(trained)),
        OWN: (own, len(suffixes)),
        CREDITED: (own + weight * (len(suffixes) - own), len(suffixes)),
        TOKENS: (tokens, len(trained)),
        LENGTH: (sum(len(r.token_ids) for r in fresh), len(fresh)),
    }
    for name, rollouts in ((FRESH, fresh), (RESET, suffixes)):
        verdicts = [r.score.correct for r in rollouts if r.score.failure is None]
        sums[name] = sum(verdicts), len(verdicts)
    return {name: (float(n), float(d)) for name, (n, d) in sums.items() if d}


def predicted_gain(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Of these steps together; None if they say nothing, or no fresh rollout is right."""
    mean = {
        name: float(np.mean(known))
        for name in (FRESH, RESET, SUFFIXES, OWN, CREDITED, TOKENS, LENGTH)
        if (known := [row[name] for row in rows if name in row])
    }
    if not mean.get(FRESH) or TOKENS not in mean:
        return None
    share, base = mean[SUFFIXES], _odds(mean[FRESH])
    signal, noise = (1 - share) * base**0.5, 1 - share
    if share and RESET in mean:
        signal += share * mean[CREDITED] * _odds(mean[RESET]) ** 0.5
        noise += share * mean[OWN]
    return signal**2 / (noise * base) * mean[LENGTH] / mean[TOKENS]


def _odds(rate: float) -> float:
    rate = min(rate, SURE)
    return rate / (1 - rate)


def verdict(rows: Sequence[Mapping[str, float]]) -> str | None:
    """One line on a run's latest steps; None where nothing was reset."""
    rows = [row for row in rows if SUFFIXES in row][-LAST:]
    if not rows:
        return None
    facts = [
        f"{words} {np.mean(known):.2f}"
        for name, words in (
            (FRESH, "pass rate from prompts"),
            (RESET, "from reset states"),
            ("localize/clean_rate", "clean prefixes"),
        )
        if (known := [row[name] for row in rows if name in row])
    ]
    return f"resets, last {len(rows)} steps: {', '.join(facts)}; {_advice(rows)}"


def _advice(rows: Sequence[Mapping[str, float]]) -> str:
    gain = predicted_gain(rows)
    if gain is None:
        return "no fresh rollout is right: GRPO would learn nothing here"
    said = f"predicted gain over GRPO {gain:.2f}x"
    if gain >= PAYS:
        return f"{said}: resets pay here"
    if gain > COSTS:
        return f"{said}: no difference worth a word"
    pass_rate = np.mean([row[FRESH] for row in rows])
    why = f"polishing at {pass_rate:.0%}" if pass_rate >= POLISHING else "resets do not pay here"
    return f"{said}: {why}: use algorithm.resets=none"

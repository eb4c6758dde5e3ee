"""Do resets pay here?   groups -> sums; metrics -> a verdict

What a step can learn from is how much rewards differ among rollouts that left the same state: the
signal is sum (r - mean)^2 over a prompt's groups. Of N fresh rollouts it is (N - 1) v on average, v
the variance of rewards from the prompt, which the step's own fresh rollouts tell. Resets move
rollouts to other states and cost tokens (localization, seeds) or save them (suffixes are short):

    predicted gain = signal per generated token / that of N fresh rollouts of the same prompts

With rewards 0 and 1, V = pass rate from a prompt, W = from a reset state, b base rollouts and k
suffixes, the numerator is (b - 1) V (1 - V) + (k - 1) W (1 - W). The rule knows nothing of which
tokens are credited, nor of where a gradient points; `tools/claims.py --only gradients` measures how
far it is off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_srpo.types import Group

SIGNAL, FRESH = "reset/signal_per_token", "reset/signal_per_token_grpo"
"""Quotients of two sums each, as all metrics of a step are."""
LAST = 10
"""Steps that a verdict looks at."""
PAYS, COSTS = 1.1, 0.9
"""Predicted gains between these are no difference worth a word."""
POLISHING = 0.9
"""Pass rate from which on there is little left to find by going back."""


def signal_sums(groups: Sequence[Group], num_rollouts: int) -> dict[str, tuple[float, float]]:
    """Both metrics of prompts that have two fresh rollouts or more; others tell nothing of v."""
    by_prompt: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_prompt[group.prompt.id].append(group)
    sums = np.zeros((2, 2))
    for own in by_prompt.values():
        rollouts = [(r, g) for g in own for r in g.rollouts]
        fresh = [r for r, g in rollouts if g.use == "train" and not r.num_copied]
        rewards = [r.score.value for r in fresh if r.score.failure is None]
        if len(rewards) < 2:
            continue
        tokens = sum(len(r.token_ids) - r.num_copied for r, _ in rollouts)
        tokens += sum(reset.num_tokens for g in own for reset in g.resets)
        sums[0] += sum(_squares(g) for g in own if g.use == "train"), tokens
        length = np.mean([len(r.token_ids) for r in fresh])
        sums[1] += (num_rollouts - 1) * np.var(rewards, ddof=1), num_rollouts * length
    if not sums[:, 1].all():
        return {}
    return {name: (float(n), float(d)) for name, (n, d) in zip((SIGNAL, FRESH), sums, strict=True)}


def _squares(group: Group) -> float:
    rewards = [r.score.value for r in group.rollouts if r.score.failure is None]
    return float(np.var(rewards) * len(rewards)) if rewards else 0.0


def predicted_gain(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Of these steps together; None if they say nothing, or fresh rollouts all agree."""
    told = [row for row in rows if SIGNAL in row]
    fresh = sum(row[FRESH] for row in told)
    return sum(row[SIGNAL] for row in told) / fresh if fresh else None


def verdict(rows: Sequence[Mapping[str, float]]) -> str | None:
    """One line on a run's latest steps; None where nothing was reset."""
    rows = [row for row in rows if SIGNAL in row][-LAST:]
    if not rows:
        return None
    facts = [
        f"{words} {np.mean(known):.2f}"
        for name, words in (
            ("pass_rate/base", "pass rate from prompts"),
            ("pass_rate/suffix", "from reset states"),
            ("localize/clean_rate", "clean prefixes"),
        )
        if (known := [row[name] for row in rows if name in row])
    ]
    return f"resets, last {len(rows)} steps: {', '.join(facts)}; {_advice(rows)}"


def _advice(rows: Sequence[Mapping[str, float]]) -> str:
    gain = predicted_gain(rows)
    if gain is None:
        return "no prompt's fresh rollouts differ: nothing to compare with"
    said = f"predicted gain over GRPO {gain:.2f}x"
    if gain >= PAYS:
        return f"{said}: resets pay here"
    if gain > COSTS:
        return f"{said}: no difference worth a word"
    pass_rate = np.mean([row.get("pass_rate/base", 0.0) for row in rows])
    why = f"polishing at {pass_rate:.0%}" if pass_rate >= POLISHING else "resets do not pay here"
    return f"{said}: {why}: use algorithm.resets=none"

"""What a shape is predicted to be worth, against numbers worked out by hand and a simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_srpo.metrics import combine, rollout_sums
from megatron_srpo.payoff import (
    CREDITED,
    FRESH,
    LENGTH,
    OWN,
    RESET,
    SUFFIXES,
    TOKENS,
    payoff_sums,
    predicted_gain,
    verdict,
)
from megatron_srpo.types import Group, Reset
from tests.unit.builders import config, group, rewarded, rollout


def branching() -> list[Group]:
    """Two fresh rollouts of 4 tokens, one right; two suffixes of 2 own tokens, both right."""
    base = group(rollout("abc", id="b0", reward=1.0), rollout("abc", id="b1"))
    suffixes = [rollout("abx", id=f"s{i}", reward=1.0, num_copied=2, seed_id="b1") for i in (0, 1)]
    reset = Reset(seed_id="b1", thought=1, cause="named", answer="ab", num_tokens=3)
    return [base, group(*suffixes, resets=(reset,))]


def test_every_generated_token_counts_and_a_copied_one_has_the_credit_that_the_rule_gives_it():
    masked = {
        **{FRESH: (1.0, 2.0), RESET: (2.0, 2.0), SUFFIXES: (2.0, 4.0)},
        **{OWN: (1.0, 2.0), CREDITED: (1.0, 2.0)},
        **{TOKENS: (4.0 + 4 + 2 + 2 + 3, 4.0), LENGTH: (8.0, 2.0)},
    }
    assert payoff_sums(branching(), config().credit) == masked
    chain = config(credit={"rule": "chain", "prefix_weight": 0.5}).credit
    assert payoff_sums(branching(), chain) == masked | {CREDITED: (1.5, 2.0)}


def test_draws_in_search_of_a_seed_cost_tokens_and_tell_how_often_the_policy_passes():
    found = payoff_sums([*branching(), group(rollout("abc", id="x"), use="seeds")], config().credit)
    assert found[FRESH] == (1.0, 3.0) and found[TOKENS] == (19.0, 4.0)
    assert found[SUFFIXES] == (2.0, 4.0)


def test_a_reward_that_failed_is_no_verdict():
    failed = rollout("abc", id="f", failure="died")
    found = payoff_sums([group(rollout("abc", reward=1.0), failed)], config().credit)
    assert found[FRESH] == (1.0, 1.0) and RESET not in found and OWN not in found


PRICE = {TOKENS: 8.0, LENGTH: 10.0}


def test_the_gain_is_the_formula_s():
    # f = 1/2, V = .2, W = .5: odds 1/4 and 1; u = s = 1/2.
    row = {FRESH: 0.2, RESET: 0.5, SUFFIXES: 0.5, OWN: 0.5, CREDITED: 0.5, **PRICE}
    signal, noise = 0.5 * 0.5 + 0.5 * 0.5, 0.5 + 0.25
    assert predicted_gain([row]) == pytest.approx(signal**2 / noise / 0.25 / 0.8)
    # Credit on the prefix adds signal and no noise.
    assert predicted_gain([row | {CREDITED: 1.0}]) == pytest.approx(0.75**2 / noise / 0.25 / 0.8)


def test_fresh_rollouts_alone_gain_nothing_over_themselves():
    credit = config().credit
    sums = payoff_sums([rewarded(1, 0, 0, 1), rewarded(0, 0, 1, 0)], credit)
    assert predicted_gain([combine([sums])]) == pytest.approx(1)


def test_where_no_fresh_rollout_is_right_there_is_nothing_to_compare_with():
    row = combine([rollout_sums([group(rollout("a"), rollout("b", id="b"))], config())])
    assert row[FRESH] == 0 and predicted_gain([row]) is None and predicted_gain([{}]) is None
    said = verdict([row])
    assert said is not None and said.endswith("GRPO would learn nothing here")


def test_a_pass_rate_of_one_has_no_infinite_odds():
    row = {FRESH: 1.0, RESET: 1.0, SUFFIXES: 0.5, OWN: 0.5, CREDITED: 0.5, **PRICE}
    assert predicted_gain([row]) == pytest.approx(0.75**2 / 0.75 / 0.8)


Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Scores of thoughts [G, T], rewards [G], which thoughts are credited by advantage [G, T]."""


def simulated(b: int, k: int, rule: str, *, num: int = 2000) -> tuple[float, dict[str, float]]:
    """Signal to noise per thought that was generated, and what the rule is told, of chains of 8
    thoughts that are right independently, three of them hard; a reset finds the first wrong one."""
    rng = np.random.default_rng(0)
    squares, along, cost = 0.0, 0.0, 0
    rates: list[bool] = []
    after: list[bool] = []
    own: list[float] = []
    for _ in range(num):
        p = rng.permutation([0.5] * 3 + [0.95] * 5)
        truth = (1 - p) / np.linalg.norm(1 - p)
        right: Any = rng.random((b, 8)) < p
        rewards: Any = right.all(1)
        first = int(np.argmin(rewards))
        groups: list[Rows] = [(np.where(right, 1 - p, -p), rewards, np.ones((b, 8), bool))]
        rates += [*rewards]
        cost += 8 * b
        if k and not rewards[first]:
            cut = int(np.argmin(right[first]))
            again: Any = np.tile(right[first], (k, 1))
            again[:, cut:] = rng.random((k, 8 - cut)) < p[cut:]
            mask = np.tile(np.arange(8) >= cut, (k, 1))
            groups.append((np.where(again, 1 - p, -p), again.all(1), mask))
            after += [*again.all(1)]
            own.append(1 - cut / 8)
            cost += k * (8 - cut)
        elif k:  # to fresh rollouts of the base group
            more: Any = rng.random((k, 8)) < p
            scores = np.concatenate([groups[0][0], np.where(more, 1 - p, -p)])
            groups = [(scores, np.append(rewards, more.all(1)), np.ones((b + k, 8), bool))]
            cost += 8 * k
        gradient = _credited(groups, rule)
        along += float(gradient @ truth)
        squares += float(gradient @ gradient)
    signal = (along / num) ** 2
    told = {FRESH: float(np.mean(rates)), TOKENS: cost / num / 8, LENGTH: 8.0, SUFFIXES: 0.0}
    if k:
        share, u = k / 8 * len(own) / num, float(np.mean(own))
        told |= {RESET: float(np.mean(after)), SUFFIXES: share, OWN: u}
        told[CREDITED] = 1.0 if rule == "chain" else u
    return signal / (squares / num - signal) / cost, told


def _credited(groups: list[Rows], rule: str) -> np.ndarray:
    pools: list[Any] = [*groups]
    if rule == "chain":
        pools = [[np.concatenate(part) for part in zip(*groups, strict=True)]]
    total = np.zeros(8)
    for scores, rewards, mask in pools:
        if spread := rewards.std():
            advantage = (rewards - rewards.mean()) / spread
            total += (advantage[:, None] * scores * mask).sum(0)
            if rule == "chain":
                total += (rewards[:, None] / spread * scores * ~mask).sum(0)
    return total


def test_methods_are_ranked_as_a_simulation_of_chains_ranks_them():
    arms: list[Any] = [(2, 6, "chain"), (4, 4, "chain"), (2, 6, "group"), (4, 4, "group")]
    grpo, _ = simulated(8, 0, "group")
    found = [simulated(*arm) for arm in arms]
    gains = [snr / grpo for snr, _ in found]
    predicted = [predicted_gain([told]) or 0.0 for _, told in found]
    assert gains == sorted(gains, reverse=True) and predicted == sorted(predicted, reverse=True)
    # Chain credit is worth its tokens there; what is predicted is too high, by less than two.
    assert gains[1] > 1.4
    assert all(1 < p / gain < 2 for p, gain in zip(predicted, gains, strict=True))


def row_of(gain: float, rate: float) -> dict[str, float]:
    """Fresh rollouts at another price."""
    known = {FRESH: rate, RESET: rate, SUFFIXES: 0.5, OWN: 1.0, CREDITED: 1.0}
    return known | {TOKENS: 10 / gain, LENGTH: 10.0, "localize/clean_rate": 0.75}


@pytest.mark.parametrize(
    "gain, rate, words",
    [
        (2.0, 0.3, "predicted gain over GRPO 2.00x: resets pay here"),
        (1.0, 0.3, "predicted gain over GRPO 1.00x: no difference worth a word"),
        (0.5, 0.3, "0.50x: resets do not pay here: use algorithm.resets=none"),
        (0.5, 0.93, "0.50x: polishing at 93%: use algorithm.resets=none"),
    ],
)
def test_a_run_says_whether_resets_pay(gain: float, rate: float, words: str):
    said = verdict([row_of(gain, rate)] * 3)
    assert said is not None and said.endswith(words)
    rates = f"pass rate from prompts {rate:.2f}, from reset states {rate:.2f}, clean prefixes 0.75"
    assert said.startswith(f"resets, last 3 steps: {rates}; ")


def test_only_the_latest_steps_count_and_a_run_without_resets_says_nothing():
    said = verdict([row_of(9.0, 0.3)] * 5 + [row_of(0.5, 0.3)] * 10)
    assert said is not None and "0.50x" in said
    assert verdict([{"pass_rate/base": 0.5}]) is None

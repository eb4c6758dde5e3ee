"""What a shape is predicted to be worth, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_srpo.metrics import combine, rollout_sums
from megatron_srpo.payoff import FRESH, SIGNAL, predicted_gain, signal_sums, verdict
from megatron_srpo.types import Group, Reset
from tests.unit.builders import config, group, prompt, rewarded, rollout

METHOD = {"num_rollouts": 4, "split": "1x2"}


def branching(*, tokens: int = 3) -> list[Group]:
    """Two fresh rollouts of 4 tokens, one right; two suffixes of 2 own tokens, one right."""
    base = group(rollout("abc", id="b0", reward=1.0), rollout("abc", id="b1"))
    suffixes = [
        rollout("abx", id=f"s{i}", reward=reward, num_copied=2, seed_id="b1")
        for i, reward in enumerate((1.0, 0.0))
    ]
    reset = Reset(seed_id="b1", thought=1, cause="named", answer="ab", num_tokens=tokens)
    return [base, group(*suffixes, resets=(reset,))]


def test_signal_is_what_rewards_differ_in_a_group_and_every_generated_token_counts():
    # Squares 1/2 in each group; tokens 4 + 4 + 2 + 2 + 3. Fresh: 3 x variance 1/2, 4 x 4 tokens.
    assert signal_sums(branching(), 4) == {SIGNAL: (1.0, 15.0), FRESH: (1.5, 16.0)}
    assert predicted_gain([combine([rollout_sums(branching(), config(algorithm=METHOD))])]) == (
        pytest.approx((1 / 15) / (1.5 / 16))
    )


def test_fresh_rollouts_alone_are_predicted_to_gain_nothing_over_themselves():
    sums = signal_sums([rewarded(1, 0, 0, 1), rewarded(0, 0, 1, 0)], 8)
    (a, b), (c, d) = sums[SIGNAL], sums[FRESH]
    # The two groups are one prompt's: 8 rollouts, 2 tokens' worth of nothing else.
    assert a / b == pytest.approx((1 + 0.75) / 32)
    assert c / d == pytest.approx(7 * np.var([1, 0, 0, 1, 0, 0, 1, 0], ddof=1) / 32)
    alone = signal_sums([rewarded(1, 0, 0, 1)], 4)
    assert alone[SIGNAL][0] / alone[SIGNAL][1] == pytest.approx(alone[FRESH][0] / alone[FRESH][1])


def test_the_numerator_is_the_textbook_s_on_average():
    # b = 4, k = 4, V = .3, W = .6: 3 V (1 - V) + 3 W (1 - W); fresh: 7 V (1 - V).
    rng = np.random.default_rng(0)
    total = np.zeros(2)
    for number in range(4000):
        of = prompt(id=f"p{number}")
        base = [
            rollout("a", id=f"{number}b{i}", of=of, reward=float(rng.random() < 0.3))
            for i in range(4)
        ]
        suffixes = [
            rollout("ab", id=f"{number}s{i}", of=of, num_copied=1, reward=float(rng.random() < 0.6))
            for i in range(4)
        ]
        sums = signal_sums([group(*base), group(*suffixes)], 8)
        total += (sums[SIGNAL][0], sums[FRESH][0])
    assert total / 4000 == pytest.approx([3 * 0.21 + 3 * 0.24, 7 * 0.21], rel=0.03)


def test_draws_in_search_of_a_seed_cost_tokens_and_give_no_signal():
    with_seeds = [*branching(), group(rollout("abc", id="x"), use="seeds")]
    before, after = signal_sums(branching(), 4), signal_sums(with_seeds, 4)
    assert after[FRESH] == before[FRESH]
    assert after[SIGNAL] == (before[SIGNAL][0], before[SIGNAL][1] + 4)


def test_prompts_without_two_verdicts_say_nothing():
    failed = rollout("abc", id="f", failure="died")
    assert signal_sums([group(rollout("abc", reward=1.0), failed)], 4) == {}
    assert predicted_gain([{SIGNAL: 0.0, FRESH: 0.0}]) is None


@pytest.mark.parametrize(
    "signal, pass_rate, words",
    [
        (2.0, 0.3, "predicted gain over GRPO 2.00x: resets pay here"),
        (1.0, 0.3, "predicted gain over GRPO 1.00x: no difference worth a word"),
        (0.5, 0.3, "0.50x: resets do not pay here: use algorithm.resets=none"),
        (0.5, 0.93, "0.50x: polishing at 93%: use algorithm.resets=none"),
    ],
)
def test_a_run_says_whether_resets_pay(signal: float, pass_rate: float, words: str):
    row = {SIGNAL: signal, FRESH: 1.0, "pass_rate/base": pass_rate, "pass_rate/suffix": 0.5}
    said = verdict([row] * 3)
    assert said is not None and said.endswith(words)
    assert said.startswith(
        f"resets, last 3 steps: pass rate from prompts {pass_rate:.2f}, from reset states 0.50"
    )


def test_only_the_latest_steps_count_and_a_run_without_resets_says_nothing():
    early, late = {SIGNAL: 9.0, FRESH: 1.0}, {SIGNAL: 1.0, FRESH: 2.0}
    said = verdict([early] * 5 + [late] * 10)
    assert said is not None and "0.50x" in said
    assert verdict([{"pass_rate/base": 0.5}]) is None

"""Evaluation: the estimate of pass@k, what a response without a verdict counts, seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from megatron_srpo.config import Config
from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.evaluate import Attempt, HeldOut, attempt_sums, chance_at, evaluate, pass_at
from megatron_srpo.metrics import combine
from megatron_srpo.protocols import Reward
from megatron_srpo.rewards.exact import last_line
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import Prompt, Score
from tests.unit.builders import TOKENIZER, config, in_place, prompt

SETS = {"sets": {"held_out": {"data": "held_out.jsonl"}}}


def attempts(verdicts: str, *, id: str = "p", **fields: Any) -> list[Attempt]:
    """One per letter: + right, - wrong, ? the reward failed."""
    known: dict[str, Any] = {"text": "", "num_tokens": 3, "finish_reason": "stop", "seed": 0}
    return [
        Attempt(
            set="held_out",
            prompt_id=id,
            index=index,
            score=Score(
                value=float(verdict == "+"),
                correct=verdict == "+",
                failure="broken" if verdict == "?" else None,
            ),
            **known | fields,
        )
        for index, verdict in enumerate(verdicts)
    ]


def answering(*prompts: Prompt, reward: Reward = last_line, **eval: Any) -> list[Attempt]:
    """Of an engine that answers 0 or 1, as a request's own random numbers say."""
    generator = FakeGenerator(lambda context, rng: "x" * rng.randrange(9) + f"\n{rng.choice('01')}")
    return measured(prompts, generator, config(eval=SETS | eval), reward)


def measured(
    prompts: Sequence[Prompt], generator: FakeGenerator, cfg: Config, reward: Reward = last_line
) -> list[Attempt]:
    judge = in_place(reward)
    held_out = HeldOut(name="held_out", prompts=prompts, judge=judge)
    return evaluate(held_out, generator=generator, tokenizer=TOKENIZER, judge=judge, cfg=cfg)


def test_pass_at_k_is_the_share_of_all_choices_of_k_responses_that_hold_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            by_hand = sum(map(any, choices)) / len(choices)
            assert chance_at(k, n, c) == pytest.approx(by_hand, abs=1e-15)


def test_pass_at_k_is_that_of_the_estimator_written_out_by_hand():
    assert chance_at(1, 10, 3) == pytest.approx(0.3)
    assert chance_at(2, 5, 2) == pytest.approx(1 - 3 / 10)
    assert chance_at(8, 1000, 0) == 0.0
    assert chance_at(100, 1000, 901) == 1.0


def test_problems_weigh_alike_and_replicas_add_up():
    cfg = config(eval=SETS | {"num_samples": 4, "pass_at": [1, 2]})
    one, two = attempts("+---", id="one"), attempts("++--", id="two")
    three = attempts("++++", id="three", num_tokens=9, finish_reason="length")
    alone = combine([attempt_sums([*one, *two, *three], cfg)])
    assert alone == pytest.approx(
        {
            "eval/held_out/pass_at_1": (1 / 4 + 1 / 2 + 1) / 3,
            "eval/held_out/pass_at_2": (1 / 2 + 5 / 6 + 1) / 3,
            "eval/held_out/response_tokens_mean": 5.0,
            "eval/held_out/truncated_rate": 1 / 3,
            "eval/held_out/failure_rate": 0.0,
        }
    )
    shares = [attempt_sums(one, cfg), attempt_sums([*two, *three], cfg), attempt_sums([], cfg)]
    assert combine(shares) == pytest.approx(alone)


def test_a_response_whose_reward_failed_is_counted_and_is_not_a_wrong_one():
    cfg = config(eval=SETS | {"num_samples": 4, "pass_at": [1, 4]})
    sums = attempt_sums([*attempts("+-??", id="a"), *attempts("+---", id="b")], cfg)
    assert sums["eval/held_out/failure_rate"] == (2, 8)
    assert sums["eval/held_out/pass_at_1"] == (1 / 2 + 1 / 4, 2)
    assert sums["eval/held_out/pass_at_4"] == (1.0, 1)  # the other problem has only two verdicts


def test_agreement_is_the_share_of_responses_with_two_verdicts_that_are_the_same():
    cfg, seconds = config(), [True, True, None, True, False]
    done = [
        replace(attempt, score=replace(attempt.score, second_opinion=second))
        for attempt, second in zip(attempts("+--?-"), seconds, strict=True)
    ]
    sums = attempt_sums(done, cfg)
    assert sums["eval/held_out/agreement"] == (2, 3)
    assert sums["eval/held_out/second_opinion_rate"] == (2, 3)
    assert "eval/held_out/agreement" not in attempt_sums(attempts("+-"), cfg)


def test_where_no_problem_has_a_verdict_there_is_no_pass_at_k_rather_than_a_zero():
    metrics = combine([attempt_sums(attempts("?"), config())])
    assert pass_at(1, attempts("?")) == {}
    assert metrics["eval/held_out/failure_rate"] == 1.0
    assert "eval/held_out/pass_at_1" not in metrics


def test_attempts_come_in_the_order_of_the_prompts_whichever_finishes_first():
    problems = [prompt(f"{i}=", id=f"q/{i}", answer="1") for i in range(4)]
    done = answering(*problems, num_samples=3)
    assert [(a.prompt_id, a.index) for a in done] == [(p.id, i) for p in problems for i in range(3)]
    assert len({attempt.num_tokens for attempt in done}) > 3
    assert all(a.num_tokens == len(a.text) + 1 for a in done)  # and an end of sequence
    assert all(a.score.correct == a.text.endswith("\n1") for a in done)
    assert {a.score.correct for a in done} == {True, False}


def test_an_attempt_does_not_depend_on_the_other_problems_nor_on_the_number_of_samples():
    problems = [prompt(f"{i}=", id=str(i)) for i in range(5)]
    texts = {(a.prompt_id, a.index): a.text for a in answering(*problems, num_samples=4)}
    for attempt in answering(problems[3], num_samples=2):
        assert texts[attempt.prompt_id, attempt.index] == attempt.text
    assert len(set(texts.values())) > 10


def test_the_requests_are_what_the_config_says():
    generator = FakeGenerator(lambda context, rng: "1")
    cfg = config(
        seed=5,
        rollout={"top_p": 0.9, "max_response_tokens": 20},
        eval=SETS | {"temperature": 0.6, "num_samples": 2},
    )
    measured([prompt("2=")], generator, cfg)
    ((first, second),) = generator.seen
    assert (first.purpose, first.max_tokens, first.temperature, first.top_p) == (
        "eval",
        20,
        0.6,
        0.9,
    )
    assert first.context.tolist() == TOKENIZER.encode("2=").tolist()
    assert first.seed == counter_seed(5, "eval", "p", 0, 0)
    assert second.seed == counter_seed(5, "eval", "p", 0, 1)


def test_a_response_that_was_cut_is_told_from_one_that_ended():
    generator = FakeGenerator(lambda context, rng: "1" * rng.randrange(5, 40))
    cfg = config(eval=SETS | {"num_samples": 30})
    done = measured([prompt()], generator, cfg)
    cut = [attempt for attempt in done if attempt.finish_reason == "length"]
    assert cut and all(attempt.num_tokens == 24 for attempt in cut)
    assert all(attempt.num_tokens < 25 for attempt in done)
    assert attempt_sums(done, cfg)["eval/held_out/truncated_rate"] == (len(cut), 30)


def test_greedy_responses_come_beside_the_sampled_ones_and_seeds_draw_anew():
    generator = FakeGenerator(lambda context, rng: f"{rng.random()}\n1")
    cfg = config(eval=SETS | {"greedy": True, "num_samples": 2, "num_seeds": 2, "temperature": 0.7})
    done = measured([prompt(id="a"), prompt(id="b")], generator, cfg)
    assert [(a.prompt_id, a.seed, a.index) for a in done] == [
        (id, seed, index)
        for id in "ab"
        for seed, index in ((None, 0), (0, 0), (0, 1), (1, 0), (1, 1))
    ]
    (requests,) = generator.seen
    assert [r.temperature for r in requests] == [0.0, 0.7, 0.7, 0.7, 0.7] * 2
    sampled = [attempt.text for attempt in done if attempt.seed is not None]
    assert len(set(sampled)) == 8
    one_seed = config(eval=SETS | {"num_samples": 2})
    again = measured([prompt(id="b")], generator, one_seed)
    assert [a.text for a in again] == [a.text for a in done if a.prompt_id == "b" and a.seed == 0]


def test_greedy_responses_have_a_rate_of_their_own():
    cfg = config(eval=SETS | {"greedy": True, "num_samples": 2})
    sums = attempt_sums([*attempts("+", seed=None), *attempts("--"), *attempts("+-", seed=1)], cfg)
    assert sums["eval/held_out/greedy"] == (1.0, 1)
    assert sums["eval/held_out/pass_at_1"] == (0.5, 2)
    only = config(eval=SETS | {"greedy": True, "num_samples": 0})
    assert "eval/held_out/pass_at_1" not in attempt_sums(attempts("+", seed=None), only)


def test_sets_are_told_apart_by_their_name():
    sets = {"sets": {"held_out": {"data": "a.jsonl"}, "other": {"data": "b.jsonl"}}}
    done = attempts("+-", id="same")
    others = [replace(attempt, set="other") for attempt in attempts("++", id="same")]
    sums = attempt_sums([*done, *others], config(eval=sets))
    assert sums["eval/held_out/pass_at_1"] == (0.5, 1)
    assert sums["eval/other/pass_at_1"] == (1.0, 1)

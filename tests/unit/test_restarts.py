"""Rounds of resets, dead prompts and control rules, against groups worked out by hand.

A rollout is right if its last line is 1. "5 6 2" has the thoughts 5, 6 and 2.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.metrics import combine, rollout_sums
from megatron_srpo.resets import DialReset
from megatron_srpo.types import Group
from tests.unit.builders import (
    TOKENIZER,
    collect,
    config,
    prompt,
    requests,
    responses,
    rollout,
    scripted,
    text_of,
)

ROUNDS: dict[str, Any] = {"num_rollouts": 5, "split": "1x4", "reset_rounds": 2}
BASE = responses("base", "5\n6\n7\n2") | {"0/p/base/0/localize": r"\boxed{2}"}
"""Its second thought is blamed: suffixes leave "5"."""


def run(answers: dict[str, str], **algorithm: Any) -> tuple[list[Group], FakeGenerator]:
    generator = scripted(answers)
    return collect(generator, cfg=config(algorithm=algorithm)), generator


def texts(group: Group) -> list[str]:
    return [text_of(rollout.token_ids).replace("\n", " ") for rollout in group.rollouts]


def test_a_round_that_fails_altogether_is_localized_and_the_next_leaves_the_furthest_state():
    answers = BASE | responses("suffix", "8\n4\n2", "9\n3\n3", "1", "6")
    answers |= {"0/p/suffix/0/localize": r"\boxed{4}", "0/p/suffix/1/localize": r"\boxed{3}"}
    groups, _ = run(answers, **ROUNDS)
    assert [texts(group) for group in groups] == [
        ["5 6 7 2$"],
        ["5 8 4 2$", "5 9 3 3$"],
        ["5 8 4 1$", "5 8 4 6$"],
    ]
    assert [r.seed_id for r in groups[2].rollouts] == ["0/p/suffix/0"] * 2
    assert [r.num_copied for r in groups[2].rollouts] == [6, 6]
    # The suffix that the next round left is on record with it, the nearer one with what it was.
    record = {r.seed_id: (r.thought, r.moved_from, r.cause) for g in groups for r in g.resets}
    assert record == {
        "0/p/base/0": (1, None, "named"),
        "0/p/suffix/0": (3, None, "named"),
        "0/p/suffix/1": (None, 2, "nearer"),
    }


def test_after_a_success_the_next_round_leaves_the_same_state_and_nothing_is_asked():
    answers = BASE | responses("suffix", "8\n1", "9\n2", "1", "6")
    groups, generator = run(answers, **ROUNDS)
    assert [texts(group) for group in groups] == [
        ["5 6 7 2$"],
        ["5 8 1$", "5 9 2$", "5 1$", "5 6$"],
    ]
    assert len(requests(generator, "localize")) == 1


@pytest.mark.parametrize("blamed", [1, 2])
def test_a_line_never_goes_back_before_its_own_state(blamed: int):
    answers = BASE | responses("suffix", "8\n2", "9\n3", "1", "6")
    answers |= {f"0/p/suffix/{i}/localize": rf"\boxed{{{blamed}}}" for i in range(2)}
    groups, _ = run(answers, **ROUNDS)
    assert [texts(group) for group in groups][1] == ["5 8 2$", "5 9 3$", "5 1$", "5 6$"]
    assert [[r.cause for r in g.resets] for g in groups] == [["nearer", "nearer"], ["named"]]


def test_a_third_round_goes_on_from_the_second_ones_state():
    answers = responses("base", "5\n6\n2") | {"0/p/base/0/localize": r"\boxed{2}"}
    answers |= responses("suffix", "7\n2", "8\n2", "1")
    answers |= {f"0/p/suffix/{i}/localize": r"\boxed{3}" for i in range(2)}
    groups, _ = run(answers, num_rollouts=4, split="1x3", reset_rounds=3)
    # Thought 3 of the second suffix is its "8"'s successor: "5 7 8" was all that was there.
    assert [texts(group) for group in groups] == [
        ["5 6 2$"],
        ["5 7 2$"],
        ["5 7 8 2$", "5 7 1$"],
    ]


def test_every_localization_of_every_round_is_counted_and_found_seeds_are_those_of_the_base():
    answers = BASE | responses("suffix", "8\n4\n2", "9\n3\n3", "1", "6")
    answers |= {"0/p/suffix/0/localize": r"\boxed{4}", "0/p/suffix/1/localize": r"\boxed{3}"}
    groups, _ = run(answers, **ROUNDS)
    metrics = combine([rollout_sums(groups, config(algorithm=ROUNDS))])
    assert metrics["tokens/localize"] == 3 * (len(r"\boxed{2}") + 1)
    assert metrics["reset/seed_found_rate"] == 1
    assert metrics["reset/skipped_rate"] == 0
    assert metrics["reset/thought_index_mean"] == (1 + 3) / 2


def test_missing_seeds_get_all_their_fresh_rollouts_in_the_first_round():
    answers = responses("base", "1") | responses("extra", "1", "2", "3", "1")
    groups, generator = run(answers, **ROUNDS)
    assert [texts(group) for group in groups] == [["1$", "1$", "2$", "3$", "1$"]]
    assert len(requests(generator, "extra")) == 4


def test_a_dead_prompt_is_reset_and_one_with_a_success_is_not():
    dead, mixed = prompt("d=", id="d"), prompt("m=", id="m")
    answers = responses("base", "5\n2", "5\n3", id="d") | responses("base", "5\n2", "1", id="m")
    answers |= responses("suffix", "1", "2", id="d") | responses("extra", "3", "1", id="m")
    answers |= {"0/d/base/0/localize": r"\boxed{2}"}
    cfg = config(algorithm={"num_rollouts": 4, "split": "1x2", "allocation": "dead"})
    groups = collect(scripted(answers), dead, mixed, cfg=cfg)
    assert [texts(group) for group in groups] == [
        ["5 2$", "5 3$"],
        ["5 1$", "5 2$"],
        ["5 2$", "1$", "3$", "1$"],
    ]


def test_a_reset_to_the_prompt_is_grpo_in_two_stages():
    answers = responses("base", "5\n2", "1") | responses("suffix", "1", "5\n2")
    groups, generator = run(answers, num_rollouts=4, split="1x2", resets="prompt")
    assert [texts(group) for group in groups] == [["5 2$", "1$", "1$", "5 2$"]]
    assert requests(generator, "localize") == []


def test_the_dial_is_right_as_often_as_it_says_and_random_otherwise():
    solved = prompt(solution=("5", "6", "7", "8", "1"))
    seeds = [rollout("5\n6\n9\n8\n2", id=f"{i}/p/base/0", of=solved) for i in range(3000)]
    silent = FakeGenerator(lambda context, rng: "")

    def thoughts(dial: float) -> list[int | None]:
        cfg = config(algorithm={"resets": "dial", "dial": dial})
        return [reset.thought for reset in DialReset(cfg, TOKENIZER).choose(seeds, silent)]

    assert thoughts(1.0) == [2] * 3000
    # A random one is right in a fifth: .75 + .05, standard deviation .0073.
    assert thoughts(0.75).count(2) / 3000 == pytest.approx(0.8, abs=0.03)
    assert thoughts(0.0).count(2) / 3000 == pytest.approx(0.2, abs=0.03)
    assert set(thoughts(0.0)) == {0, 1, 2, 3, 4}


def test_a_dialled_reset_counts_as_a_localization():
    answers = responses("base", "5\n6\n2", "1") | responses("suffix", "1", "2")
    cfg = config(algorithm={"num_rollouts": 4, "split": "1x2", "resets": "dial"})
    groups = collect(scripted(answers), prompt(solution=("5", "1")), cfg=cfg)
    metrics = combine([rollout_sums(groups, cfg)])
    assert metrics["localize/exact_rate"] == metrics["localize/clean_rate"] == 1
    assert metrics["tokens/localize"] == 0

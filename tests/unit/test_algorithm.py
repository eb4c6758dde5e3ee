"""GRPO, RRPO and SRPO with the default choices, against groups and samples worked out by hand.

Letters: tokens are characters, `$` is end of sequence, a thought ends with a newline, the reward
compares the last line with the prompt's answer 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_srpo.algorithm import collect_groups
from megatron_srpo.draws import Drawn
from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.protocols import Generator
from megatron_srpo.restarts import Line, go_back, starts
from megatron_srpo.rewards.exact import last_line
from megatron_srpo.rollouts import Roles
from megatron_srpo.types import AlarmError, Group, Prompt, Reset, Rollout, Sample, Score
from tests.unit.builders import (
    MIXED_BASE,
    NAMED,
    SUFFIXES,
    TOKENIZER,
    collect,
    config,
    ids,
    in_place,
    names,
    prompt,
    requests,
    responses,
    rollout,
    samples_of,
    scripted,
    text_of,
)


def samples_by_id(groups: list[Group]) -> dict[str, Sample]:
    return {sample.id: sample for sample in samples_of(groups)}


def advantage_of(sample: Sample) -> float:
    """The one value that all trained tokens have."""
    (value,) = set(sample.advantage[sample.loss_weight > 0].tolist())
    return value


def advantages(groups: list[Group]) -> list[float]:
    return [advantage_of(sample) for sample in samples_of(groups)]


# --- the split 1x4 -----------------------------------------------------------------------------


def test_srpo_makes_a_group_of_base_rollouts_and_a_group_of_suffixes():
    base, suffix = collect(scripted(NAMED))
    assert ids(base) == names("base", 4)
    assert ids(suffix) == names("suffix", 4)
    assert {r.stage for r in base.rollouts} == {"base"}
    assert {r.stage for r in suffix.rollouts} == {"suffix"}


def test_the_seed_is_the_first_failed_base_rollout_and_stays_in_its_group():
    base, suffix = collect(scripted(NAMED))
    assert suffix.resets[0].seed_id == "0/p/base/1"
    assert "0/p/base/1" in ids(base)
    assert not base.resets


def test_the_reset_says_where_who_and_what_was_answered():
    _, suffix = collect(scripted(NAMED))
    assert suffix.resets[0] == Reset(
        seed_id="0/p/base/1",
        thought=1,
        cause="named",
        answer=r"\boxed{2}",
        num_tokens=10,
    )


def test_a_suffix_continues_the_tokens_of_the_seed_before_the_blamed_thought():
    generator = scripted(NAMED)
    _, suffix = collect(generator)
    assert [text_of(r.context) for r in requests(generator, "suffix")] == ["p=5\n"] * 4
    assert [text_of(r.token_ids) for r in suffix.rollouts] == [
        "5\n1$",
        "5\n8\n1$",
        "5\n9$",
        "5\n1$",
    ]
    assert [r.num_copied for r in suffix.rollouts] == [2, 2, 2, 2]


def test_copied_tokens_keep_their_parents_logprobs_and_own_tokens_have_their_own():
    _, suffix = collect(scripted(NAMED))
    assert suffix.rollouts[1].logprobs.tolist() == [-1, -2, -1, -2, -3, -4]


def test_a_start_keeps_tokens_and_logprobs_up_to_the_first_thought_that_is_not_kept():
    seed = rollout("5\n6\n2", id="seed", num_copied=2)
    drawn = Drawn(prompt=prompt(), base=[rollout("1")] * 4, seeds=[seed])
    line = Line(at=seed, thought=2, resets=())
    *_, start = starts(drawn, {"seed": line}, 0, config().algorithm)
    assert (start.stage, start.index, start.seed_id) == ("suffix", 3, "seed")
    assert text_of(start.token_ids) == "5\n6\n"
    assert start.logprobs.tolist() == [-1, -2, -1, -2]


def test_each_group_is_normalised_by_its_own_population_statistics():
    # Base 1 0 0 1: mean 1/2, std 1/2. Suffixes 1 1 0 1: mean 3/4, std sqrt(3)/4.
    a, b = 1 / 3**0.5, -(3**0.5)
    expected = [1, -1, -1, 1, a, a, b, a]
    assert advantages(collect(scripted(NAMED))) == pytest.approx(expected, rel=1e-6)


def test_the_reward_sees_the_copied_prefix_too():
    def whole(prompt: Prompt, response: str) -> Score:
        return Score(value=float(response == "5\n1"), correct=response == "5\n1")

    _, suffix = collect(scripted(NAMED), reward=whole)
    assert [r.score.value for r in suffix.rollouts] == [1, 0, 0, 1]


def test_a_suffix_trains_only_on_tokens_it_sampled():
    sample = samples_by_id(collect(scripted(NAMED)))["0/p/suffix/1"]
    assert text_of(sample.token_ids) == "p=5\n8\n1$"
    assert sample.loss_weight.tolist() == [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25]
    assert sample.advantage[:4].tolist() == [0, 0, 0, 0]


def test_prompt_tokens_carry_no_loss_and_a_sampled_eos_does():
    sample = samples_by_id(collect(scripted(NAMED)))["0/p/base/0"]
    assert text_of(sample.token_ids) == "p=5\n1$"
    assert sample.loss_weight.tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]
    assert sample.advantage.tolist() == [0, 0, 1, 1, 1, 1]
    assert sample.logprob.tolist() == [0, 0, -1, -2, -3, -4]


def test_every_sequence_counts_once_whatever_its_length():
    samples = samples_of(collect(scripted(NAMED)))
    assert len(samples) == 8
    assert [sample.count for sample in samples] == pytest.approx([1.0] * 8, rel=1e-6)
    own_lengths = [np.count_nonzero(sample.loss_weight) for sample in samples]
    assert own_lengths == [4, 6, 4, 2, 2, 4, 2, 2]


@pytest.mark.parametrize("split, num_base, num_suffixes", [("1x1", 7, 1), ("1x6", 2, 6)])
def test_other_splits_divide_the_same_number_of_rollouts(
    split: str, num_base: int, num_suffixes: int
):
    cfg = config(algorithm={"split": split})
    answers = responses("base", *["5\n2"] * num_base) | responses("suffix", *["1"] * num_suffixes)
    base, suffix = collect(scripted(answers | {"0/p/base/0/localize": r"\boxed{2}"}), cfg=cfg)
    assert ids(base) == names("base", num_base)
    assert ids(suffix) == names("suffix", num_suffixes)


# --- cases in which no second state exists --------------------------------------------------


def test_a_prompt_without_a_failed_rollout_makes_one_group_of_fresh_rollouts():
    answers = responses("base", *["5\n1"] * 4) | responses("extra", "1", "2", "3\n1", "4")
    generator = scripted(answers)
    (only,) = collect(generator)
    assert ids(only) == names("base", 4) + names("extra", 4)
    assert not only.resets
    assert [r.num_copied for r in only.rollouts] == [0] * 8
    assert [text_of(r.context) for r in requests(generator, "extra")] == ["p="] * 4
    assert requests(generator, "localize") == []
    # Rewards 1 1 1 1 1 0 1 0: mean 3/4, std sqrt(3)/4.
    a, b = 1 / 3**0.5, -(3**0.5)
    assert advantages([only]) == pytest.approx([a, a, a, a, a, b, a, b], rel=1e-6)


@pytest.mark.parametrize(
    "answer, cause",
    [
        ("no idea", "unparsed"),
        (r"\boxed{9}", "unparsed"),
        (r"\boxed{0}", "no_error"),
        (r"\boxed{1}", "named"),
    ],
)
def test_an_answer_that_leads_to_the_first_thought_makes_one_group_of_all_rollouts(
    answer: str, cause: str
):
    restarted = responses("suffix", "1", "2", "1", "3")
    generator = scripted(MIXED_BASE | restarted | {"0/p/base/1/localize": answer})
    (only,) = collect(generator)
    assert ids(only) == names("base", 4) + names("suffix", 4)
    assert (only.resets[0].thought, only.resets[0].cause) == (0, cause)
    assert [text_of(r.context) for r in requests(generator, "suffix")] == ["p="] * 4
    assert [r.num_copied for r in only.rollouts] == [0] * 8
    # Rewards 1 0 0 1 1 0 1 0 of one group: mean 1/2, std 1/2.
    assert advantages([only]) == pytest.approx([1, -1, -1, 1, 1, -1, 1, -1], rel=1e-6)


def test_grpo_makes_one_group_of_base_rollouts_and_asks_for_nothing_else():
    cfg = config(algorithm={"resets": "none"})
    generator = scripted(responses("base", "1", "2", "3", "4", "5", "6", "7", "8"))
    (only,) = collect(generator, cfg=cfg)
    assert ids(only) == names("base", 8)
    assert not only.resets
    assert [len(batch) for batch in generator.seen if batch] == [8]
    # One reward in eight: mean 1/8, std sqrt(7)/8.
    expected = [7**0.5] + [-1 / 7**0.5] * 7
    assert advantages([only]) == pytest.approx(expected, rel=1e-6)


def test_the_oracle_goes_back_to_before_the_first_wrong_thought():
    cfg = config(algorithm={"resets": "oracle"})
    known = prompt(solution=("5", "8", "1"))
    generator = scripted(MIXED_BASE | SUFFIXES)
    _, suffix = collect(generator, known, cfg=cfg)
    # The seed 5 6 2 is right in its first thought only.
    assert suffix.resets[0] == Reset(seed_id="0/p/base/1", thought=1, cause="oracle")
    assert requests(generator, "localize") == []


class Confused:
    """A rule that answers for a rollout that it was not asked about."""

    def choose(self, seeds: Sequence[Rollout], generator: Generator) -> list[Reset]:
        return [Reset(seed_id="another", thought=0, cause="mine") for _ in seeds]


def test_a_rule_that_answers_for_another_rollout_is_refused():
    judge = in_place(last_line)
    roles = Roles(generator=scripted(NAMED), tokenizer=TOKENIZER, judge=judge, rule=Confused())
    with pytest.raises(AlarmError, match=r"the reset rule answered for \['another'\]"):
        collect_groups([prompt()], step=0, roles=roles, cfg=config())


def test_rrpo_never_asks_the_policy():
    cfg = config(algorithm={"resets": "random"})
    generator = FakeGenerator(lambda context, rng: "5\n6\n7\n2")
    groups = collect(generator, cfg=cfg)
    assert [batch[0].purpose for batch in generator.seen] == ["base", "suffix"]
    assert groups[-1].resets[0].cause == "random"


# --- length -----------------------------------------------------------------------------------


def test_a_response_cut_by_length_is_scored_as_it_stands_and_can_be_the_seed():
    # 24 tokens are allowed: base/0 is cut behind a right last line, base/1 behind an empty one.
    cut = responses("base", "5\n" * 11 + "\n1" + "999", "55\n" * 10, "1", "1")
    generator = scripted(cut | SUFFIXES | {"0/p/base/1/localize": r"\boxed{2}"})
    base, suffix = collect(generator)
    assert [r.finish_reason for r in base.rollouts] == ["length", "length", "stop", "stop"]
    assert [r.score.value for r in base.rollouts] == [1, 0, 1, 1]
    assert suffix.resets[0].seed_id == "0/p/base/1"
    assert [text_of(r.context) for r in requests(generator, "suffix")] == ["p=55\n"] * 4
    cut_sample = samples_by_id([base, suffix])["0/p/base/0"]
    assert cut_sample.loss_weight[2:].tolist() == pytest.approx([1 / 24] * 24, rel=1e-6)


LONG = "5\n" * 11 + "2"
"""12 thoughts that begin at tokens 0, 2, ..., 22."""


@pytest.mark.parametrize(
    "named, kept, moved_from",
    [(11, 10, None), (12, 10, 11), (2, 1, None)],
)
def test_a_prefix_that_leaves_no_room_for_a_thought_gives_way_to_the_last_that_does(
    named: int, kept: int, moved_from: int | None
):
    # 24 tokens in all, 4 for a thought: a prefix has at most 20, which are 10 thoughts.
    answers = responses("base", LONG, "1", "1", "1") | responses("suffix", *["1"] * 4)
    generator = scripted(answers | {"0/p/base/0/localize": rf"\boxed{{{named}}}"})
    _, suffix = collect(generator)
    assert (suffix.resets[0].thought, suffix.resets[0].moved_from) == (kept, moved_from)
    (context,) = {text_of(r.context) for r in requests(generator, "suffix")}
    assert context == "p=" + "5\n" * kept


def test_a_reset_that_moves_to_the_first_thought_merges_the_groups():
    cfg = config(thoughts={"max_tokens": 24})
    generator = scripted(NAMED)
    (only,) = collect(generator, cfg=cfg)
    assert ids(only) == names("base", 4) + names("suffix", 4)
    assert (only.resets[0].thought, only.resets[0].moved_from) == (0, 1)
    assert only.resets[0].cause == "named" and only.resets[0].answer == r"\boxed{2}"


def test_a_reset_with_room_is_left_as_it_was():
    reset = Reset(seed_id="r", thought=1, cause="random")
    assert go_back(reset, rollout("5\n6\n2"), config()) == reset


def test_prefix_and_suffix_together_are_as_long_as_a_response_may_be():
    generator = scripted(NAMED)
    collect(generator)
    assert {r.max_tokens for r in requests(generator, "base")} == {24}
    assert {r.max_tokens for r in requests(generator, "suffix")} == {22}


def test_rollouts_are_sampled_at_the_training_temperature_in_every_stage():
    generator = scripted(NAMED)
    collect(generator, cfg=config(rollout={"temperature": 0.75}, localize={"temperature": 0.25}))
    assert {r.temperature for r in requests(generator, "base")} == {0.75}
    assert {r.temperature for r in requests(generator, "suffix")} == {0.75}
    assert {r.temperature for r in requests(generator, "localize")} == {0.25}


# --- rewards without signal, and rewards that fail -------------------------------------------


def test_a_group_whose_rewards_agree_has_advantages_of_exactly_zero_and_still_counts():
    answers = MIXED_BASE | responses("suffix", "2", "3", "4", "6")
    groups = collect(scripted(answers | {"0/p/base/1/localize": r"\boxed{2}"}))
    samples = samples_of(groups[1:])
    assert [advantage_of(sample) for sample in samples] == [0.0] * 4
    assert not any(sample.is_trained for sample in samples)
    assert [sample.count for sample in samples] == [1.0] * 4


def fails_on_x(prompt: Prompt, response: str) -> Score:
    if "x" in response:
        return Score(value=0.0, correct=False, failure="timeout")
    return last_line(prompt, response)


def test_a_rollout_whose_reward_failed_is_never_the_seed():
    base = responses("base", "x\n2", "5\n1", "5\n6\n2", "x")
    generator = scripted(base | SUFFIXES | {"0/p/base/2/localize": r"\boxed{2}"})
    _, suffix = collect(generator, reward=fails_on_x)
    assert suffix.resets[0].seed_id == "0/p/base/2"


def test_a_prompt_whose_only_failures_are_failed_rewards_has_no_seed():
    answers = responses("base", "x", "1", "x", "1") | responses("extra", "1", "1", "1", "1")
    (only,) = collect(scripted(answers), reward=fails_on_x)
    assert not only.resets and len(only.rollouts) == 8


def test_a_failed_reward_is_left_out_of_statistics_loss_and_count():
    base = responses("base", "x\n2", "5\n1", "5\n6\n2", "1")
    generator = scripted(base | SUFFIXES | {"0/p/base/2/localize": r"\boxed{2}"})
    samples = samples_of(collect(generator, reward=fails_on_x)[:1])
    # Of the rest, 1 0 1: mean 2/3, std sqrt(2)/3.
    assert [advantage_of(s) for s in samples[1:]] == pytest.approx([0.5**0.5, -(2**0.5), 0.5**0.5])
    assert not samples[0].loss_weight.any() and not samples[0].advantage.any()
    assert [s.count for s in samples] == pytest.approx([0, 1, 1, 1])


# --- localization is asked, never trained on -------------------------------------------------


def test_localization_tokens_are_in_no_sample_and_are_counted():
    generator = scripted(NAMED | {"0/p/base/1/localize": r"ZZ \boxed{2}"})
    groups = collect(generator)
    samples = samples_of(groups)
    assert not any("Z" in text_of(sample.token_ids) for sample in samples)
    assert groups[1].resets[0].num_tokens == len(r"ZZ \boxed{2}$")


def test_the_policy_is_asked_exactly_the_filled_template_about_the_seed():
    template = "Q {prompt} R {response} S {steps} {{x}}"
    generator = scripted(NAMED)
    collect(generator, cfg=config(localize={"template": template}))
    (asked,) = requests(generator, "localize")
    expected = "Q p= R 5\n6\n2 S Step 1: 5\nStep 2: 6\nStep 3: 2\n {x}"
    assert text_of(asked.context) == expected

"""GRPO, RRPO and SRPO against groups and samples worked out by hand (DESIGN section 4's table).

Letters: tokens are characters, `$` is end of sequence, a thought ends with a newline, the reward
compares the last line with the prompt's answer 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from megatron_srpo.algorithm import collect_groups, go_back, start_again
from megatron_srpo.draws import Drawn
from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.resets import RULES
from megatron_srpo.rewards import last_line
from megatron_srpo.rollouts import Roles, roll_out
from megatron_srpo.types import Completion, Group, Prompt, Request, Reset, Sample, Score, Start
from tests.unit.builders import (
    TOKENIZER,
    collect,
    config,
    prompt,
    requests,
    responses,
    rollout,
    samples_of,
    scripted,
    text_of,
)

MIXED_BASE = responses("base", "5\n1", "5\n6\n2", "5\n7", "1")
"""Right, wrong, wrong, right."""
SUFFIXES = responses("suffix", "1", "8\n1", "9", "1")
"""After "5\\n": right, right, wrong, right."""
NAMED = MIXED_BASE | SUFFIXES | {"0/p/base/1/localize": r"\boxed{2}"}


def samples_by_id(groups: list[Group]) -> dict[str, Sample]:
    return {sample.id: sample for sample in samples_of(groups)}


def advantage_of(sample: Sample) -> float:
    """The one value that all trained tokens have."""
    (value,) = set(sample.advantage[sample.loss_weight > 0].tolist())
    return value


def advantages(groups: list[Group]) -> list[float]:
    return [advantage_of(sample) for sample in samples_of(groups)]


def ids(group: Group) -> list[str]:
    return [rollout.id for rollout in group.rollouts]


def names(stage: str, num: int, id: str = "p") -> list[str]:
    return [f"0/{id}/{stage}/{index}" for index in range(num)]


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
    reset = Reset(seed_id="seed", thought=2, cause="named")
    drawn = Drawn(prompt=prompt(), base=[rollout("1")] * 4, seeds=[seed])
    *_, start = start_again(drawn, {"seed": reset}, config())
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


# --- several prompts: stages, order, seeds --------------------------------------------------

TWO = (prompt("p=", id="p"), prompt("q=", id="q"))
TWO_ANSWERS = NAMED | responses("base", *["1"] * 4, id="q") | responses("extra", *"1231", id="q")


def test_each_stage_is_one_batch_of_requests_over_all_prompts():
    generator = scripted(TWO_ANSWERS)
    collect(generator, *TWO)
    purposes = [[request.purpose for request in batch] for batch in generator.seen]
    assert purposes == [["base"] * 8, ["localize"], ["suffix"] * 4 + ["extra"] * 4]


def test_every_prompt_gets_its_own_rollouts_in_the_order_of_the_prompts():
    groups = collect(scripted(TWO_ANSWERS), *TWO)
    assert [ids(g) for g in groups] == [
        names("base", 4),
        names("suffix", 4),
        names("base", 4, "q") + names("extra", 4, "q"),
    ]
    assert [g.prompt.id for g in groups] == ["p", "p", "q"]
    assert all(r.prompt is g.prompt for g in groups for r in g.rollouts)


def test_resets_belong_to_their_own_prompts_when_an_earlier_prompt_has_none():
    first_right = (
        NAMED | responses("base", *["1"] * 4, id="a") | responses("extra", *"1231", id="a")
    )
    groups = collect(scripted(first_right), prompt("a=", id="a"), prompt())
    assert [[r.seed_id for r in g.resets] for g in groups] == [[], [], ["0/p/base/1"]]


def draw(context: str, rng: random.Random) -> str:
    """Digits in lines; a localization question (it ends with ?) is answered by a number."""
    if context.endswith("?"):
        return rf"\boxed{{{rng.randint(0, 4)}}}"
    return "\n".join(rng.choice("123") for _ in range(rng.randint(1, 6)))


def drawn(
    prompts: Sequence[Prompt], *, run_seed: int = 0, step: int = 0, resets: str = "self"
) -> dict[str, str]:
    cfg = config(seed=run_seed, algorithm={"resets": resets})
    groups = collect(FakeGenerator(draw), *prompts, cfg=cfg, step=step)
    return {r.id: text_of(r.token_ids) for g in groups for r in g.rollouts}


MANY = [prompt(f"{letter}=", id=letter) for letter in "abcdefg"]


def test_permuting_prompts_changes_no_rollout():
    assert drawn(MANY) == drawn([*reversed(MANY)]) == drawn(MANY[3:] + MANY[:3])


def test_splitting_prompts_over_replicas_changes_no_rollout():
    assert drawn(MANY) == drawn(MANY[:2]) | drawn(MANY[2:3]) | drawn(MANY[3:])


def test_another_step_or_run_seed_draws_other_rollouts():
    first = [*drawn(MANY, resets="none").values()]
    assert first != [*drawn(MANY, resets="none", step=1).values()]
    assert first != [*drawn(MANY, resets="none", run_seed=1).values()]


def test_rollouts_that_leave_the_same_state_have_different_seeds():
    generator = FakeGenerator(draw)
    collect(generator, *MANY)
    seeds = [request.seed for batch in generator.seen for request in batch]
    assert len(set(seeds)) == len(seeds)


def test_every_group_holds_rollouts_of_its_own_prompt_also_where_an_epoch_ends():
    from megatron_srpo.data import PromptSet  # brings `datasets` with it

    cfg = config(algorithm={"resets": "none"})
    for seed in range(5):
        source = PromptSet(MANY[:3], seed=seed, replica=0, num_replicas=1)
        for step in range(3):
            groups = collect(FakeGenerator(draw), *source.next(2), cfg=cfg, step=step)
            assert all(r.prompt.id == g.prompt.id for g in groups for r in g.rollouts)
            assert [len(g.rollouts) for g in groups] == [8, 8]


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


# --- rolling out -------------------------------------------------------------------------------


class Recorder:
    """A generator and a reward that write down when each of them is at work."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._inner = FakeGenerator(lambda context, rng: "1")

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for completion in self._inner.generate(requests):
            self.events.append("generated")
            yield completion

    def reward(self, prompt: Prompt, response: str) -> Score:
        self.events.append("scored")
        return last_line(prompt, response)


def test_a_response_is_scored_before_the_next_one_is_waited_for():
    recorder, cfg = Recorder(), config()
    rule = RULES["self"](cfg, TOKENIZER)
    roles = Roles(generator=recorder, tokenizer=TOKENIZER, reward=recorder.reward, rule=rule)
    starts = [Start(prompt=prompt(), stage="base", index=index) for index in range(3)]
    roll_out(starts, name="0", roles=roles, cfg=cfg)
    assert recorder.events == ["generated", "scored"] * 3


def test_rollouts_come_in_the_order_of_their_starts_though_short_ones_finish_first():
    base = responses("base", "5\n5\n5\n2", "5\n2", "5\n5\n2", "2")
    generator = scripted(base | responses("suffix", *"1111") | {"0/p/base/0/localize": "?"})
    (only,) = collect(generator)
    assert [text_of(r.token_ids) for r in only.rollouts[:4]] == [t + "$" for t in base.values()]


def test_a_rollout_says_which_weights_and_how_many_cached_tokens_it_had():
    class Cached(FakeGenerator):
        def _complete(self, request: Request) -> Completion:
            done = super()._complete(request)
            fields = {name: getattr(done, name) for name in done.__slots__}
            cached = len(request.context) if request.purpose == "suffix" else 1
            return Completion(**fields | {"num_cached_tokens": cached})

    generator = Cached(lambda context, rng: r"\boxed{2}" if context.endswith("?") else "5\n2")
    generator.load_weights(iter(()), version=7)
    base, suffix = collect(generator)
    assert {r.weight_version for r in base.rollouts + suffix.rollouts} == {7}
    assert {r.num_cached_tokens for r in suffix.rollouts} == {4}
    assert suffix.resets[0].num_cached_tokens == 1


def test_no_stage_changes_what_it_was_given():
    cfg = config()
    rule = RULES["self"](cfg, TOKENIZER)
    generator = scripted(NAMED)
    roles = Roles(generator=generator, tokenizer=TOKENIZER, reward=last_line, rule=rule)
    (sample, *_) = samples_of(collect_groups([prompt()], step=0, roles=roles, cfg=cfg))
    for array in (sample.token_ids, sample.loss_weight, sample.advantage, sample.logprob):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0

"""Where each rule goes back to, and that a rule's choice depends on its own seed alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.resets import (
    RULES,
    DepthMatchedReset,
    DialReset,
    OracleReset,
    PromptReset,
    RandomReset,
    SelfReset,
    checked,
    first_wrong_thought,
)
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import AlarmError, Reset, Rollout
from tests.unit.builders import TOKENIZER, config, prompt, rollout, text_of

SILENT = FakeGenerator(lambda context, rng: "")


def seeds(*texts: str, step: int = 0) -> list[Rollout]:
    """Failed rollouts of different prompts a, b, c, ..."""
    return [
        rollout(text, id=f"{step}/{letter}/base/0", of=prompt(f"{letter}=", id=letter))
        for letter, text in zip("abcdefgh", texts, strict=False)
    ]


def random_thought(seed: Rollout, run_seed: int = 0) -> int | None:
    (reset,) = RandomReset(config(seed=run_seed), TOKENIZER).choose([seed], SILENT)
    return reset.thought


def test_random_resets_are_uniform_over_all_thoughts_first_and_last_included():
    counts = Counter(random_thought(*seeds("1\n2\n3\n4", step=step)) for step in range(4000))
    assert sorted(counts) == [0, 1, 2, 3]  # type: ignore[type-var]
    # 1000 expected each, standard deviation 27.
    assert all(abs(count - 1000) < 110 for count in counts.values())


def test_a_random_reset_does_not_depend_on_its_neighbours():
    rule = RandomReset(config(seed=3), TOKENIZER)
    for step in range(20):
        many = seeds("1\n2\n3\n4\n5\n6", "1\n2\n3\n4\n5\n6", "1\n2\n3\n4\n5\n6", "1\n2", step=step)
        alone = [rule.choose([seed], SILENT)[0] for seed in many]
        assert rule.choose(many, SILENT) == alone


def test_random_resets_of_different_prompts_steps_and_runs_are_drawn_apart():
    def thoughts(run_seed: int, which: int) -> list[int | None]:
        both = [seeds(*["1\n2\n3\n4\n5\n6\n7\n8"] * 2, step=step) for step in range(30)]
        return [random_thought(two[which], run_seed) for two in both]

    assert thoughts(0, 0) == thoughts(0, 0)
    assert len({tuple(thoughts(0, 0)), tuple(thoughts(0, 1)), tuple(thoughts(1, 0))}) == 3
    assert len(set(thoughts(0, 0))) > 1


def test_a_random_reset_says_so_and_costs_no_tokens():
    (reset,) = RandomReset(config(), TOKENIZER).choose(seeds("1\n2"), SILENT)
    assert (reset.seed_id, reset.cause, reset.num_tokens, reset.answer) == (
        "0/a/base/0",
        "random",
        0,
        "",
    )


def test_the_policys_answers_reach_their_own_seeds_though_short_ones_finish_first():
    replies = {
        "a=": r"a long answer \boxed{3}",
        "b=": "none",
        "c=": r"\boxed{0}",
        "d=": r"middle \boxed{1}",
    }
    generator = FakeGenerator(lambda context, rng: replies[context[:2]])
    cfg = config(localize={"max_tokens": 64})
    rule = SelfReset(cfg, TOKENIZER)
    resets = rule.choose(seeds("1\n2\n3", "1\n2", "4", "5\n6"), generator)
    assert [(r.seed_id, r.thought, r.cause) for r in resets] == [
        ("0/a/base/0", 2, "named"),
        ("0/b/base/0", 0, "unparsed"),
        ("0/c/base/0", 0, "no_error"),
        ("0/d/base/0", 0, "named"),
    ]
    assert [r.answer for r in resets] == list(replies.values())
    assert [r.num_tokens for r in resets] == [len(text) + 1 for text in replies.values()]
    assert all(r.moved_from is None for r in resets)


def test_a_localization_request_has_its_own_purpose_limit_temperature_and_seed():
    cfg = config(seed=5, localize={"max_tokens": 7, "temperature": 0.25})
    generator = FakeGenerator(lambda context, rng: "1")
    SelfReset(cfg, TOKENIZER).choose(seeds("1\n2", "3", step=9), generator)
    (batch,) = generator.seen
    assert [text_of(request.context) for request in batch] == ["a=1\n2?", "b=3?"]
    assert [request.seed for request in batch] == [
        counter_seed(5, "9/a/base/0/localize"),
        counter_seed(5, "9/b/base/0/localize"),
    ]
    assert {(r.purpose, r.max_tokens, r.temperature) for r in batch} == {("localize", 7, 0.25)}


def test_a_question_that_leaves_no_room_for_its_answer_is_not_asked_and_restarts():
    cfg = config(
        localize={"max_tokens": 20, "template": "{response}" * 3}, rollout={"max_model_len": 52}
    )
    generator = FakeGenerator(lambda context, rng: r"\boxed{2}")
    long = "\n".join("1" * 12)  # the question has 69 characters, the other one 9
    resets = SelfReset(cfg, TOKENIZER).choose(seeds(long, "1\n2"), generator)
    assert [(r.thought, r.cause) for r in resets] == [(0, "too_long"), (1, "named")]
    assert [len(batch) for batch in generator.seen] == [1]


def test_a_question_that_leaves_just_the_room_for_its_answer_is_asked():
    cfg = config(
        localize={"max_tokens": 20, "template": "{response}"}, rollout={"max_model_len": 52}
    )
    generator = FakeGenerator(lambda context, rng: r"\boxed{2}")
    resets = SelfReset(cfg, TOKENIZER).choose(seeds("1\n" * 16, "1\n" * 16 + "1"), generator)
    assert [len(request.context) for (request,) in generator.seen] == [32]
    assert [reset.cause for reset in resets] == ["named", "too_long"]


@pytest.mark.parametrize("fallback", ["random", "skip"])
def test_a_question_that_is_too_long_goes_where_the_config_says(fallback: str):
    cfg = config(
        localize={"max_tokens": 20, "template": "{response}" * 9, "fallback": fallback},
        rollout={"max_model_len": 52},
    )
    many = [seed for step in range(12) for seed in seeds("1\n2\n3\n4\n5", step=step)]
    resets = SelfReset(cfg, TOKENIZER).choose(many, SILENT)
    expected = [random_thought(seed) if fallback == "random" else None for seed in many]
    assert [(reset.thought, reset.cause) for reset in resets] == [(e, "too_long") for e in expected]


def test_the_configs_parser_reads_the_answer():
    cfg = config(localize={"parser": "verdicts", "max_tokens": 64})
    generator = FakeGenerator(lambda context, rng: r"++- \boxed{1}")
    (reset,) = SelfReset(cfg, TOKENIZER).choose(seeds("1\n2\n3"), generator)
    assert (reset.thought, reset.cause) == (2, "named")


@pytest.mark.parametrize(
    "text, solution, expected",
    [
        ("5\n8\n2", ("5", "8", "1"), 2),
        ("4\n8\n1", ("5", "8", "1"), 0),
        (" 5 \n7\n1", ("5", "8 ", "1"), 1),
        ("5\n8\n1\n9", ("5", "8", "1"), 3),
        ("5\n8", ("5", "8", "1"), 1),
        ("5", (), None),
    ],
    ids=["last", "first", "spaces", "goes on", "stops short", "unknown"],
)
def test_the_first_wrong_thought_is_the_first_that_differs_from_the_solution(
    text: str, solution: tuple[str, ...], expected: int | None
):
    assert first_wrong_thought(rollout(text, of=prompt(solution=solution)), "\n") == expected


def test_the_oracle_blames_the_first_wrong_thought_of_each_seed():
    known = prompt(solution=("1", "2", "3"))
    failed = [rollout("1\n2\n4", id="x", of=known), rollout("1\n3\n3", id="y", of=known)]
    resets = OracleReset(config(), TOKENIZER).choose(failed, SILENT)
    assert [(r.seed_id, r.thought, r.cause) for r in resets] == [
        ("x", 2, "oracle"),
        ("y", 1, "oracle"),
    ]


def test_the_oracle_refuses_a_task_without_a_solution():
    with pytest.raises(AssertionError, match="p: the oracle needs a `solution`"):
        OracleReset(config(), TOKENIZER).choose([rollout("1")], SILENT)


def test_the_config_names_the_rule():
    assert {
        "none": RandomReset,  # never asked
        "random": RandomReset,
        "self": SelfReset,
        "oracle": OracleReset,
        "depth_matched": DepthMatchedReset,
        "prompt": PromptReset,
        "dial": DialReset,
    } == RULES


# --- an answer that names no thought ----------------------------------------------------------


@pytest.mark.parametrize("answer, cause", [("none", "unparsed"), (r"\boxed{0}", "no_error")])
@pytest.mark.parametrize("fallback", ["restart", "random", "skip"])
def test_an_answer_that_names_no_thought_goes_where_the_config_says(
    answer: str, cause: str, fallback: str
):
    cfg = config(localize={"fallback": fallback})
    generator = FakeGenerator(lambda context, rng: answer)
    many = [seed for step in range(12) for seed in seeds("1\n2\n3\n4\n5", step=step)]
    resets = SelfReset(cfg, TOKENIZER).choose(many, generator)
    expected = {
        "restart": [0] * 12,
        "random": [random_thought(seed) for seed in many],
        "skip": [None] * 12,
    }
    assert [reset.thought for reset in resets] == expected[fallback]
    assert {(reset.cause, reset.answer) for reset in resets} == {(cause, answer)}


def test_an_answer_that_names_a_thought_needs_no_fallback():
    cfg = config(localize={"fallback": "skip"})
    generator = FakeGenerator(lambda context, rng: r"\boxed{2}")
    (reset,) = SelfReset(cfg, TOKENIZER).choose(seeds("1\n2\n3"), generator)
    assert (reset.thought, reset.cause) == (1, "named")


# --- as deep as the policy's verdict on another seed ------------------------------------------


def test_a_depth_matched_reset_takes_the_share_that_was_named_for_the_next_seed():
    replies = {"a=": r"\boxed{2}", "b=": r"\boxed{4}", "c=": r"\boxed{1}"}
    generator = FakeGenerator(lambda context, rng: replies[context[:2]])
    # Named: thought 1 of 2, 3 of 4, 0 of 8, that is a half, three quarters, none.
    resets = DepthMatchedReset(config(), TOKENIZER).choose(
        seeds("1\n2", "1\n2\n3\n4", "1\n2\n3\n4\n5\n6\n7\n8"), generator
    )
    # Three quarters of 2 thoughts, none of 4, a half of 8.
    assert [reset.thought for reset in resets] == [1, 0, 4]
    assert [reset.answer for reset in resets] == [*replies.values()]
    assert {reset.cause for reset in resets} == {"depth_matched"}


def test_seeds_of_one_length_swap_their_depths_exactly():
    # 15/22 of 22 is 14.999999999999998 as a float.
    text = "\n".join("1" * 22)
    replies = {"a=": r"\boxed{16}", "b=": r"\boxed{22}"}
    generator = FakeGenerator(lambda context, rng: replies[context[:2]])
    resets = DepthMatchedReset(config(), TOKENIZER).choose(seeds(text, text), generator)
    assert [reset.thought for reset in resets] == [21, 15]


def test_a_depth_matched_reset_is_skipped_where_the_next_seeds_was():
    replies = {"a=": r"\boxed{2}", "b=": "none", "c=": r"\boxed{3}"}
    generator = FakeGenerator(lambda context, rng: replies[context[:2]])
    cfg = config(localize={"fallback": "skip"})
    resets = DepthMatchedReset(cfg, TOKENIZER).choose(seeds(*["1\n2\n3"] * 3), generator)
    assert [reset.thought for reset in resets] == [None, 2, 1]


def test_a_depth_matched_reset_of_a_lonely_seed_is_random():
    generator = FakeGenerator(lambda context, rng: r"\boxed{2}")
    lonely = [seeds("1\n2\n3\n4\n5\n6", step=step) for step in range(30)]
    rule = DepthMatchedReset(config(), TOKENIZER)
    found = [rule.choose(seed, generator)[0].thought for seed in lonely]
    assert found == [random_thought(*seed) for seed in lonely]


# --- a rule of the user's ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "resets, message",
    [
        ([], "was asked for one reset for each of ['0/a/base/0'], in this order"),
        ([Reset(seed_id="b", thought=0, cause="mine")], "the reset rule answered for ['b']"),
        ([Reset(seed_id="0/a/base/0", thought=2, cause="mine")], "thought 2 of rollout 0/a/base/0"),
        ([Reset(seed_id="0/a/base/0", thought=-1, cause="mine")], "which has thoughts 0 to 1"),
    ],
)
def test_a_reset_that_fits_no_seed_is_refused(resets: list[Reset], message: str):
    with pytest.raises(AlarmError) as refused:
        checked(resets, seeds("1\n2"))
    assert message in str(refused.value)


def test_a_rule_may_count_in_numpy_and_must_give_a_list_of_resets():
    (seed,) = seeds("1\n2")
    given = Reset(seed_id=seed.id, thought=np.int64(1), cause="mine")  # type: ignore[arg-type]
    (reset,) = checked([given], [seed])
    assert type(reset.thought) is int and reset.thought == 1
    for wrong in (None, [0], 5):
        with pytest.raises(AlarmError, match="the reset rule must give a list of Resets, not"):
            checked(wrong, [seed])  # type: ignore[arg-type]


def test_a_depth_is_never_that_of_the_same_prompts_other_seed():
    a, b = seeds("1\n2\n3\n4", "5\n6\n7\n8")
    again = rollout("1\n2\n3\n4", id="0/a/base/1", of=a.prompt)
    replies = {"a": r"\boxed{1}", "b": r"\boxed{4}"}
    generator = FakeGenerator(lambda context, rng: replies[context[0]])
    found = DepthMatchedReset(config(), TOKENIZER).choose([a, again, b], generator)
    # a's two seeds were both sent to thought 0, b's to thought 3.
    assert [reset.thought for reset in found] == [3, 3, 0]


def test_a_depth_matched_reset_keeps_on_record_why_its_own_answer_named_nothing():
    replies = {"a=": "hm", "b=": r"\boxed{0}", "c=": r"\boxed{2}"}
    generator = FakeGenerator(lambda context, rng: replies[context[:2]])
    found = DepthMatchedReset(config(), TOKENIZER).choose(seeds("1\n2", "3\n4", "5\n6"), generator)
    assert [reset.cause for reset in found] == ["unparsed", "no_error", "depth_matched"]

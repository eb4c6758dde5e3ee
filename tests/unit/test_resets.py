"""Where each rule goes back to, and that a rule's choice depends on its own seed alone."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.resets import (
    OracleReset,
    RandomReset,
    SelfReset,
    first_wrong_thought,
    reset_rule,
)
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import Rollout
from tests.unit.builders import TOKENIZER, config, prompt, rollout, text_of

SILENT = FakeGenerator(lambda context, rng: "")


def seeds(*texts: str) -> list[Rollout]:
    """Failed rollouts of different prompts a, b, c, ..."""
    return [
        rollout(text, id=f"0/{letter}/base/0", of=prompt(f"{letter}=", id=letter))
        for letter, text in zip("abcdefgh", texts, strict=False)
    ]


def test_random_resets_are_uniform_over_all_thoughts_first_and_last_included():
    rule = RandomReset(run_seed=0)
    (seed,) = seeds("1\n2\n3\n4")
    counts = Counter(rule.choose([seed], SILENT, step)[0].thought for step in range(4000))
    assert sorted(counts) == [0, 1, 2, 3]
    # 1000 expected each, standard deviation 27.
    assert all(abs(count - 1000) < 110 for count in counts.values())


def test_a_random_reset_does_not_depend_on_its_neighbours():
    rule = RandomReset(run_seed=3)
    all_seeds = seeds("1\n2\n3\n4\n5\n6", "1\n2\n3\n4\n5\n6", "1\n2\n3\n4\n5\n6", "1\n2")
    for step in range(20):
        together = rule.choose(all_seeds, SILENT, step)
        alone = [rule.choose([seed], SILENT, step)[0] for seed in all_seeds]
        assert together == alone


def test_random_resets_of_different_prompts_steps_and_runs_are_drawn_apart():
    a, b = seeds("1\n2\n3\n4\n5\n6\n7\n8", "1\n2\n3\n4\n5\n6\n7\n8")

    def thoughts(run_seed: int, seed: Rollout) -> list[int]:
        rule = RandomReset(run_seed=run_seed)
        return [rule.choose([seed], SILENT, step)[0].thought for step in range(30)]

    assert thoughts(0, a) == thoughts(0, a)
    assert len({tuple(thoughts(0, a)), tuple(thoughts(0, b)), tuple(thoughts(1, a))}) == 3
    assert len(set(thoughts(0, a))) > 1


def test_a_random_reset_says_so_and_costs_no_tokens():
    (reset,) = RandomReset(run_seed=0).choose(seeds("1\n2"), SILENT, 0)
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
    rule = SelfReset(tokenizer=TOKENIZER, cfg=cfg)
    resets = rule.choose(seeds("1\n2\n3", "1\n2", "4", "5\n6"), generator, 0)
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
    SelfReset(tokenizer=TOKENIZER, cfg=cfg).choose(seeds("1\n2", "3"), generator, 9)
    (batch,) = generator.seen
    assert [text_of(request.context) for request in batch] == ["a=1\n2?", "b=3?"]
    assert [request.seed for request in batch] == [
        counter_seed(5, 9, "a", "localize", 0),
        counter_seed(5, 9, "b", "localize", 0),
    ]
    assert {(r.purpose, r.max_tokens, r.temperature) for r in batch} == {("localize", 7, 0.25)}


def test_a_question_that_leaves_no_room_for_its_answer_is_not_asked_and_restarts():
    cfg = config(
        localize={"max_tokens": 20, "template": "{response}" * 3}, rollout={"max_model_len": 52}
    )
    generator = FakeGenerator(lambda context, rng: r"\boxed{2}")
    long = "\n".join("1" * 12)  # the question has 69 characters, the other one 9
    resets = SelfReset(tokenizer=TOKENIZER, cfg=cfg).choose(seeds(long, "1\n2"), generator, 0)
    assert [(r.thought, r.cause) for r in resets] == [(0, "too_long"), (1, "named")]
    assert [len(batch) for batch in generator.seen] == [1]


def test_the_configs_parser_reads_the_answer():
    cfg = config(localize={"parser": "verdicts", "max_tokens": 64})
    generator = FakeGenerator(lambda context, rng: r"++- \boxed{1}")
    (reset,) = SelfReset(tokenizer=TOKENIZER, cfg=cfg).choose(seeds("1\n2\n3"), generator, 0)
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
    resets = OracleReset(delimiter="\n").choose(failed, SILENT, 0)
    assert [(r.seed_id, r.thought, r.cause) for r in resets] == [
        ("x", 2, "oracle"),
        ("y", 1, "oracle"),
    ]


def test_the_oracle_refuses_a_task_without_a_solution():
    with pytest.raises(AssertionError, match="p: the oracle needs a `solution`"):
        OracleReset(delimiter="\n").choose([rollout("1")], SILENT, 0)


def test_the_method_chooses_the_rule():
    def rule(method: str) -> object:
        return reset_rule(config(seed=4, algorithm={"method": method}), TOKENIZER)

    assert rule("rrpo") == RandomReset(run_seed=4)
    assert rule("oracle") == OracleReset(delimiter="\n")
    assert isinstance(rule("srpo"), SelfReset)

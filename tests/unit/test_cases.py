"""Every choice of the algorithm that is not the default, against groups worked out by hand.

Letters: as in test_algorithm.py. A rollout is right or wrong by its last line.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_srpo.metrics import combine, rollout_sums
from megatron_srpo.rewards.exact import last_line
from megatron_srpo.types import Group, Prompt, Score
from tests.unit.builders import (
    collect,
    config,
    prompt,
    requests,
    responses,
    rewarded,
    samples_of,
    scripted,
    text_of,
)

RIGHT, WRONG = "5\n1", "5\n6\n2"


def shape(group: Group) -> tuple[str, list[str]]:
    """(use, ids without step and prompt)"""
    return group.use, [rollout.id.split("/", 2)[2] for rollout in group.rollouts]


def run(answers: dict[str, str], **algorithm: Any) -> list[Group]:
    return collect(scripted(answers), cfg=config(algorithm=algorithm))


def named(stage: str, *thoughts: int, at: int = 0) -> dict[str, str]:
    """The policy's answers about the rollouts of a stage, from index `at` on."""
    return {
        f"0/p/{stage}/{at + i}/localize": rf"\boxed{{{number}}}"
        for i, number in enumerate(thoughts)
    }


# --- shapes (b, a, k) ---------------------------------------------------------------------------


def test_two_seeds_of_one_base_group_have_a_group_of_suffixes_each():
    answers = responses("base", WRONG, RIGHT, "4\n4\n4", RIGHT)
    answers |= responses("suffix", "1", "2", "1", "1") | named("base", 2) | named("base", 3, at=2)
    groups = run(answers, split="2x2")
    assert [shape(group) for group in groups] == [
        ("train", ["base/0", "base/1", "base/2", "base/3"]),
        ("train", ["suffix/0", "suffix/1"]),
        ("train", ["suffix/2", "suffix/3"]),
    ]
    assert [[reset.seed_id for reset in group.resets] for group in groups] == [
        [],
        ["0/p/base/0"],
        ["0/p/base/2"],
    ]
    texts = [[text_of(r.token_ids) for r in group.rollouts] for group in groups[1:]]
    assert texts == [["5\n1$", "5\n2$"], ["4\n4\n1$", "4\n4\n1$"]]
    # Suffixes 1 0 and 1 1, each measured against its own group alone.
    assert [s.advantage[-1] for s in samples_of(groups)[4:]] == [1, -1, 0, 0]


def test_the_suffixes_of_a_seed_that_was_not_found_are_fresh_rollouts_of_the_base_group():
    answers = responses("base", RIGHT, WRONG, RIGHT, RIGHT) | named("base", 2, at=1)
    answers |= responses("suffix", "1", "2") | responses("extra", "2", "1")
    groups = run(answers, split="2x2")
    assert [shape(group)[1] for group in groups] == [
        ["base/0", "base/1", "base/2", "base/3", "extra/0", "extra/1"],
        ["suffix/0", "suffix/1"],
    ]
    metrics = combine([rollout_sums(groups, config(algorithm={"split": "2x2"}))])
    assert metrics["reset/seed_found_rate"] == 0.5


def test_a_skipped_reset_is_on_record_once_beside_one_that_is_not_skipped():
    answers = responses("base", WRONG, RIGHT, WRONG, RIGHT) | {"0/p/base/0/localize": "hm"}
    answers |= named("base", 2, at=2) | responses("extra", "1", "2")
    answers |= {"0/p/suffix/2": "1", "0/p/suffix/3": "2"}
    cfg = config(algorithm={"split": "2x2"}, localize={"fallback": "skip"})
    groups = collect(scripted(answers), cfg=cfg)
    assert [shape(group)[1][-2:] for group in groups] == [
        ["extra/0", "extra/1"],
        ["suffix/2", "suffix/3"],
    ]
    assert [[(r.seed_id, r.thought) for r in group.resets] for group in groups] == [
        [("0/p/base/0", None)],
        [("0/p/base/2", 1)],
    ]


@pytest.mark.parametrize("num_rollouts, split", [(9, "3x2"), (5, "1x4"), (12, "2x3"), (8, "7x1")])
def test_every_shape_trains_the_same_number_of_rollouts(num_rollouts: int, split: str):
    seeds, suffixes = map(int, split.split("x"))
    num_base = num_rollouts - seeds * suffixes
    in_group = num_base >= seeds
    fresh = num_base if in_group else num_base + seeds
    answers = responses("base", *[WRONG] * fresh) | named("base", *[2] * fresh)
    answers |= responses("suffix", *["1"] * (seeds * suffixes))
    groups = run(
        answers,
        num_rollouts=num_rollouts,
        split=split,
        seeds="in_group" if in_group else "extra_draws",
    )
    trained = [r.stage for g in groups if g.use == "train" for r in g.rollouts]
    assert trained.count("base") == num_base
    assert trained.count("suffix") == seeds * suffixes


# --- seeds from extra draws ---------------------------------------------------------------------


def test_extra_draws_take_the_first_failed_one_out_and_train_the_first_four_others():
    # Drawn: right wrong right wrong right. The first wrong one is the seed, the others the base.
    answers = responses("base", RIGHT, WRONG, RIGHT, WRONG, RIGHT) | named("base", 2, at=1)
    groups = run(answers | responses("suffix", *"1212"), seeds="extra_draws")
    assert [shape(group) for group in groups] == [
        ("train", ["base/0", "base/2", "base/3", "base/4"]),
        ("train", ["suffix/0", "suffix/1", "suffix/2", "suffix/3"]),
        ("seeds", ["base/1"]),
    ]
    assert "0/p/base/1" not in {sample.id for sample in samples_of(groups)}


def test_extra_draws_go_on_until_one_fails_and_what_was_drawn_too_many_is_on_record():
    # Five right ones; of the next five the third is wrong.
    drawn = responses("base", *[RIGHT] * 7, WRONG, RIGHT, WRONG)
    generator = scripted(drawn | named("base", 2, at=7) | responses("suffix", *"1212"))
    groups = collect(generator, cfg=config(algorithm={"seeds": "extra_draws"}))
    assert [len(b) for b in generator.seen if b[0].purpose == "base"] == [5, 5]
    assert shape(groups[0])[1] == ["base/0", "base/1", "base/2", "base/3"]
    spare = ["base/4", "base/5", "base/6", "base/8", "base/9"]
    assert shape(groups[2]) == ("seeds", ["base/7", *spare])
    metrics = combine([rollout_sums(groups, config())])
    # Own tokens with the end of sequence: 4 right and 6 wrong ones.
    assert metrics["tokens/base"] == 4 * 4
    assert metrics["tokens/seed"] == 4 * 4 + 2 * 6


def test_extra_draws_end_at_the_most_that_are_allowed():
    drawn = responses("base", *[RIGHT] * 12) | responses("extra", *"1212")
    generator = scripted(drawn)
    groups = collect(generator, cfg=config(algorithm={"seeds": "extra_draws"}))
    assert [len(b) for b in generator.seen if b[0].purpose == "base"] == [5, 5, 2]
    # The paper's all-correct case: eight fresh rollouts, one group.
    assert [shape(group)[0] for group in groups] == ["train", "seeds"]
    assert len(groups[0].rollouts) == 8 and len(groups[1].rollouts) == 8


def test_prompts_that_have_what_they_need_are_not_drawn_again():
    ready = responses("base", WRONG, *[RIGHT] * 4, id="a")
    waiting = responses("base", *[RIGHT] * 5, WRONG, *[RIGHT] * 4, id="b")
    answers = ready | waiting | responses("suffix", *"1111", id="a")
    answers |= responses("suffix", *"1111", id="b")
    answers |= {"0/a/base/0/localize": r"\boxed{2}", "0/b/base/5/localize": r"\boxed{2}"}
    generator = scripted(answers)
    cfg = config(algorithm={"seeds": "extra_draws"})
    collect(generator, prompt(id="a"), prompt(id="b"), cfg=cfg)
    rounds = [[r.id.split("/")[1] for r in b] for b in generator.seen if b[0].purpose == "base"]
    assert rounds == [["a"] * 5 + ["b"] * 5, ["b"] * 5]


def test_two_by_four_trains_suffixes_of_two_failed_draws_and_no_base_group():
    answers = responses("base", RIGHT, WRONG, RIGHT, "4\n4\n4", RIGHT, RIGHT, RIGHT, RIGHT)
    answers |= named("base", 2, at=1) | named("base", 3, at=3)
    groups = run(answers | responses("suffix", *"11112222"), split="2x4", seeds="extra_draws")
    assert [shape(group) for group in groups] == [
        ("train", [f"suffix/{i}" for i in range(4)]),
        ("train", [f"suffix/{i}" for i in range(4, 8)]),
        ("seeds", ["base/1", "base/3", "base/0", "base/2"]),
    ]


def test_one_by_eight_is_one_group_of_eight_suffixes():
    answers = responses("base", RIGHT, WRONG) | named("base", 2, at=1)
    groups = run(answers | responses("suffix", *"12121212"), split="1x8", seeds="extra_draws")
    assert [shape(group) for group in groups] == [
        ("train", [f"suffix/{i}" for i in range(8)]),
        ("seeds", ["base/1", "base/0"]),
    ]


def test_two_by_four_with_one_failure_gives_the_other_four_to_fresh_rollouts():
    answers = responses("base", WRONG, *[RIGHT] * 11) | named("base", 2)
    answers |= responses("suffix", *"1111") | responses("extra", *"1212")
    groups = run(answers, split="2x4", seeds="extra_draws")
    assert [shape(group) for group in groups[:2]] == [
        ("train", [f"extra/{i}" for i in range(4)]),
        ("train", [f"suffix/{i}" for i in range(4)]),
    ]


# --- localization: fallback and offset ----------------------------------------------------------

MIXED = responses("base", RIGHT, "5\n6\n7\n2", RIGHT, RIGHT)


def test_a_skipped_reset_is_on_record_and_its_rollouts_are_fresh_ones():
    answers = MIXED | {"0/p/base/1/localize": "hm"} | responses("extra", *"1212")
    groups = collect(scripted(answers), cfg=config(localize={"fallback": "skip"}))
    assert [shape(group)[1][4:] for group in groups] == [[f"extra/{i}" for i in range(4)]]
    (reset,) = groups[0].resets
    assert (reset.thought, reset.cause, reset.answer) == (None, "unparsed", "hm")
    metrics = combine([rollout_sums(groups, config())])
    assert metrics["reset/skipped_rate"] == 1
    assert metrics["tokens/localize"] == 3
    assert "reset/thought_index_mean" not in metrics


def test_skipped_resets_are_on_record_at_their_own_prompts():
    answers = MIXED | {"0/p/base/1/localize": "hm"} | responses("extra", *"1212")
    answers |= {name.replace("/p/", "/q/"): text for name, text in answers.items()}
    cfg = config(localize={"fallback": "skip"})
    groups = collect(scripted(answers), prompt(id="p"), prompt(id="q"), cfg=cfg)
    resets = [[reset.seed_id for reset in group.resets] for group in groups]
    assert resets == [["0/p/base/1"], ["0/q/base/1"]]


@pytest.mark.parametrize(
    "offset, kept, moved_from", [(0, 2, None), (1, 1, 2), (2, 0, 2), (5, 0, 2)]
)
def test_the_offset_takes_a_reset_so_many_thoughts_further_back(
    offset: int, kept: int, moved_from: int | None
):
    answers = MIXED | named("base", 3, at=1) | responses("suffix", *"1212")
    groups = run(answers, reset_offset=offset)
    (reset,) = groups[-1].resets
    assert (reset.thought, reset.moved_from) == (kept, moved_from)
    assert {r.num_copied for r in groups[-1].rollouts if r.stage == "suffix"} == {2 * kept}
    metrics = combine([rollout_sums(groups, config())])
    assert metrics["reset/moved_by_mean"] == 2 - kept


# --- same state, same group ---------------------------------------------------------------------


def test_separate_keeps_a_reset_to_the_prompt_out_of_the_base_group():
    answers = MIXED | named("base", 1, at=1) | responses("suffix", *"1112")
    groups = run(answers, empty_prefix="separate")
    assert [shape(group)[1] for group in groups] == [
        ["base/0", "base/1", "base/2", "base/3"],
        ["suffix/0", "suffix/1", "suffix/2", "suffix/3"],
    ]
    # 1 1 1 0 of each group alone: mean 3/4, std sqrt(3)/4. Merged it would be 6 right of 8.
    assert samples_of(groups)[4].advantage[-1] == pytest.approx(3**-0.5)


def test_two_seeds_that_are_reset_to_the_same_state_share_a_group_unless_kept_separate():
    answers = responses("base", WRONG, "5\n9", RIGHT, RIGHT) | named("base", 2, 2)
    answers |= responses("suffix", *"1212")
    merged, kept = run(answers, split="2x2"), run(answers, split="2x2", empty_prefix="separate")
    assert [shape(group)[1] for group in merged[1:]] == [[f"suffix/{i}" for i in range(4)]]
    assert [reset.seed_id for reset in merged[1].resets] == ["0/p/base/0", "0/p/base/1"]
    assert [shape(group)[1] for group in kept[1:]] == [
        ["suffix/0", "suffix/1"],
        ["suffix/2", "suffix/3"],
    ]


def test_prefixes_of_one_length_are_different_states():
    answers = responses("base", WRONG, "4\n9", RIGHT, RIGHT) | named("base", 2, 2)
    groups = run(answers | responses("suffix", *"1212"), split="2x2")
    contexts = [[text_of(r.token_ids[: r.num_copied]) for r in g.rollouts] for g in groups[1:]]
    assert contexts == [["5\n", "5\n"], ["4\n", "4\n"]]


# --- truncated responses ------------------------------------------------------------------------


def test_a_masked_truncated_response_counts_in_the_statistics_and_not_in_the_loss():
    cut = "5\n" * 13  # 24 tokens are allowed
    answers = responses("base", cut, RIGHT, RIGHT, RIGHT) | named("base", 2)
    answers |= responses("suffix", *"1212")
    kept = samples_of(run(answers))
    masked = samples_of(run(answers, truncated="mask"), config(algorithm={"truncated": "mask"}))
    assert [s.advantage[-1] for s in kept] == [s.advantage[-1] for s in masked]
    assert not masked[0].loss_weight.any() and masked[0].count == 0
    assert kept[0].loss_weight.any() and kept[0].count == pytest.approx(1)
    for one, other in zip(kept[1:], masked[1:], strict=True):
        np.testing.assert_array_equal(one.loss_weight, other.loss_weight)


# --- groups without signal ----------------------------------------------------------------------


def test_a_prompt_without_signal_is_drawn_anew_and_its_first_rollouts_stay_on_record():
    silent = responses("base", *[RIGHT] * 4) | responses("extra", *"1111")
    again = responses("base", *[RIGHT] * 4, step="0.1") | responses("extra", *"1112", step="0.1")
    groups = run(silent | again, max_redraws=3)
    assert [(group.use, group.rollouts[0].id) for group in groups] == [
        ("replaced", "0/p/base/0"),
        ("train", "0.1/p/base/0"),
    ]
    assert {sample.id.split("/")[0] for sample in samples_of(groups)} == {"0.1"}
    metrics = combine([rollout_sums(groups, config())])
    assert metrics["group/redrawn_rate"] == 1
    assert metrics["tokens/replaced"] == 4 * 4 + 4 * 2
    assert metrics["reward/mean"] == 7 / 8


def test_a_prompt_that_stays_without_signal_is_drawn_anew_only_so_often():
    answers: dict[str, str] = {}
    for name in ("0", "0.1", "0.2"):
        answers |= responses("base", *[RIGHT] * 4, step=name)
        answers |= responses("extra", *"1111", step=name)
    groups = run(answers, max_redraws=2)
    assert [group.use for group in groups] == ["replaced", "replaced", "train"]
    assert groups[-1].rollouts[0].id == "0.2/p/base/0"


def test_a_prompt_with_signal_in_any_group_is_not_drawn_anew():
    # The base group is all wrong: no signal. The suffixes have one.
    answers = responses("base", *[WRONG] * 4) | named("base", 2) | responses("suffix", *"1222")
    loud = {name.replace("/p/", "/q/"): text for name, text in answers.items()}
    silent = responses("base", *[RIGHT] * 4) | responses("extra", *"1111")
    again = responses("base", *[RIGHT] * 4, step="0.1") | responses("extra", *"1112", step="0.1")
    generator = scripted(loud | silent | again)
    cfg = config(algorithm={"max_redraws": 1})
    groups = collect(generator, prompt(id="p"), prompt(id="q"), cfg=cfg)
    assert [(g.use, g.prompt.id) for g in groups] == [
        ("replaced", "p"),
        ("train", "q"),
        ("train", "q"),
        ("train", "p"),
    ]
    # Whatever was drawn anew, a prompt takes part in the same update as it would have.
    assert {(s.id.split("/")[1], s.turn) for s in samples_of(groups)} == {("p", 0), ("q", 1)}


def test_a_reward_that_failed_gives_a_prompt_no_signal():
    def fails_on_x(prompt: Prompt, response: str) -> Score:
        failure = "timeout" if "x" in response else None
        return replace(last_line(prompt, response), failure=failure)

    answers = responses("base", "x", *[RIGHT] * 3) | responses("extra", *"1111")
    answers |= responses("base", *[RIGHT] * 4, step="0.1") | responses("extra", *"1112", step="0.1")
    cfg = config(algorithm={"max_redraws": 1})
    groups = collect(scripted(answers), cfg=cfg, reward=fails_on_x)
    assert [group.use for group in groups] == ["replaced", "train"]


def test_seed_draws_give_a_prompt_no_signal_and_stay_seeds_when_it_is_drawn_anew():
    # One right and one wrong draw differ, but nothing learns from them; the suffixes agree.
    answers: dict[str, str] = {}
    for name, suffixes in (("0", "11111111"), ("0.1", "11111112")):
        answers |= responses("base", RIGHT, WRONG, step=name)
        answers |= {f"{name}/p/base/1/localize": r"\boxed{2}"}
        answers |= responses("suffix", *suffixes, step=name)
    groups = run(answers, split="1x8", seeds="extra_draws", max_redraws=1)
    assert [(group.use, group.rollouts[0].id) for group in groups] == [
        ("replaced", "0/p/suffix/0"),
        ("seeds", "0/p/base/1"),
        ("train", "0.1/p/suffix/0"),
        ("seeds", "0.1/p/base/1"),
    ]


@pytest.mark.parametrize("rewards", [(0.1 + 0.2, 0.3, 0.3), (1e-200, 2e-200), (1e9, 1e9 + 1e-6)])
def test_rewards_that_differ_by_rounding_alone_are_no_signal(rewards: tuple[float, ...]):
    same = rewarded(*rewards)
    assert not same.has_signal
    assert [sample.advantage[-1] for sample in samples_of([same])] == [0.0] * len(rewards)


def test_rewards_that_are_close_and_not_the_same_are_a_signal():
    close = rewarded(0.5, 0.501)
    assert close.has_signal
    assert [s.advantage[-1] for s in samples_of([close])] == pytest.approx([-1, 1], rel=1e-6)


# --- sampling -----------------------------------------------------------------------------------


def test_the_nucleus_is_that_of_the_config_in_every_stage():
    answers = MIXED | named("base", 2, at=1) | responses("suffix", *"1212")
    generator = scripted(answers)
    collect(generator, cfg=config(rollout={"top_p": 0.9}))
    asked = [requests(generator, purpose) for purpose in ("base", "suffix", "localize")]
    assert [{request.top_p for request in batch} for batch in asked] == [{0.9}] * 3

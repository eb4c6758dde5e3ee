"""Which localizations are learned from, and that replicas and restarts do not change which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megatron_srpo.retention import Labelled, OwnAnswers, answered, paid
from megatron_srpo.types import Group, Sample
from tests.unit.builders import (
    TOKENIZER,
    collect,
    config,
    prompt,
    responses,
    scripted,
    text_of,
)

ANSWER = r"\boxed{2}"
METHOD = {"num_rollouts": 3, "split": "1x1"}


def step_of(step: int, *right: bool, ids: Sequence[str] = "abc") -> list[Group]:
    """A step's groups of prompts a, b, c: base rollouts "5 6 2" and "7", both wrong, the first of
    which is sent back to "5"; whether the suffix from there is right."""
    answers: dict[str, str] = {}
    for id, is_right in zip(ids, right, strict=True):
        answers |= responses("base", "5\n6\n2", "7", id=id, step=step)
        answers |= responses("suffix", "1" if is_right else "3", id=id, step=step)
        answers |= {f"{step}/{id}/base/0/localize": ANSWER}
    prompts = [prompt(f"{id}=", id=id) for id in ids]
    return collect(scripted(answers), *prompts, cfg=config(algorithm=METHOD), step=step)


def own(source: str, *, replica: int = 0, num_replicas: int = 1, gather: Any = None) -> OwnAnswers:
    return OwnAnswers(
        cfg=config(algorithm=METHOD, retention={"source": source, "num_samples": 4}),
        tokenizer=TOKENIZER,
        replica=replica,
        num_replicas=num_replicas,
        gather=gather or (lambda answers: [answers]),
    )


def texts(samples: Sequence[Sample]) -> list[str]:
    return sorted(text_of(sample.token_ids) for sample in samples)


def test_initial_answers_are_those_of_the_first_step_and_no_other():
    learned = own("initial")
    first = learned.samples(0, step_of(0, True, False, False))
    assert texts(first) == [f"{id}=5\n6\n2?{ANSWER}$" for id in "abc"]
    assert texts(learned.samples(1, step_of(1, True, ids="d"))) == texts(first)


def test_a_sample_is_the_cross_entropy_of_the_answer_alone():
    (sample,) = own("initial").samples(0, step_of(0, True, ids="a"))
    num_question = len("a=5\n6\n2?")
    length = len(ANSWER) + 1
    assert not sample.loss_weight[:num_question].any()
    assert sample.loss_weight[num_question:].tolist() == pytest.approx([0.1 / length] * length)
    assert sample.is_auxiliary and sample.advantage[-1] == 1


def test_an_answer_that_was_cut_off_has_no_end():
    groups = step_of(0, True, ids="a")
    cut = own("initial")
    cut.cfg = config(
        algorithm=METHOD,
        retention={"source": "initial"},
        localize={"max_tokens": len(ANSWER) + 1},
    )
    (sample,) = cut.samples(0, groups)
    assert text_of(sample.token_ids) == f"a=5\n6\n2?{ANSWER}"


def test_verified_are_the_answers_that_did_better_than_fresh_rollouts():
    learned = own("verified")
    assert texts(learned.samples(0, step_of(0, True, False, False))) == [f"a=5\n6\n2?{ANSWER}$"]
    later = texts(learned.samples(1, step_of(1, False, True, ids="de")))
    assert later == [f"{id}=5\n6\n2?{ANSWER}$" for id in "ae"]


def test_a_reset_to_the_prompt_verifies_nothing():
    answers = responses("base", "5\n6\n2", "7", id="a") | responses("suffix", "1", id="a")
    answers |= {"0/a/base/0/localize": r"\boxed{1}"}
    cfg = config(algorithm=METHOD)
    groups = collect(scripted(answers), prompt("a=", id="a"), cfg=cfg)
    ((seed, reset),) = answered(groups)
    assert reset.thought == 0
    assert not paid(seed, reset, groups)


def test_only_so_many_answers_are_remembered_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_srpo.retention.MOST_VERIFIED", 2)
    learned = own("verified")
    learned.samples(0, step_of(0, True, True, ids="ab"))
    assert texts(learned.samples(1, step_of(1, True, ids="c"))) == [
        f"{id}=5\n6\n2?{ANSWER}$" for id in "bc"
    ]


@pytest.mark.parametrize("source", ["initial", "verified"])
def test_a_restart_knows_what_an_undisturbed_run_knows(
    source: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_srpo.retention.MOST_VERIFIED", 4)
    steps = [step_of(s, True, s % 2 == 0, True) for s in range(4)]
    whole, again = own(source), own(source)
    expected = [whole.samples(s, groups) for s, groups in enumerate(steps)][3]
    again.recall(3, lambda step: steps[step])
    resumed = again.samples(3, steps[3])
    assert [text_of(s.token_ids) for s in resumed] == [text_of(s.token_ids) for s in expected]


def test_replicas_learn_from_all_answers_and_share_the_samples():
    groups = step_of(0, True, True, True)
    halves = [groups[:2], groups[2:]]
    alone = own("initial").samples(0, groups)
    shares = []
    for replica in range(2):

        def gather(answers: Any) -> list[Any]:
            return [own("initial")._worth_keeping(0, half) for half in halves]

        each = own("initial", replica=replica, num_replicas=2, gather=gather)
        shares += each.samples(0, halves[replica])
    assert sorted(s.id for s in shares) == sorted(s.id for s in alone)
    assert texts(shares) == texts(alone)


def test_labelled_demonstrations_come_in_epochs_whatever_the_groups():
    demonstrations = [
        (np.array([number], np.int32), np.array([9, 1], np.int32)) for number in range(6)
    ]
    cfg = config(retention={"num_samples": 3})
    labelled = Labelled(demonstrations=demonstrations, cfg=cfg, replica=0, num_replicas=1)
    seen = [int(s.token_ids[0]) for step in range(2) for s in labelled.samples(step, [])]
    assert sorted(seen) == [*range(6)]
    halves = [
        Labelled(demonstrations=demonstrations, cfg=cfg, replica=r, num_replicas=2)
        for r in range(2)
    ]
    both = [int(s.token_ids[0]) for half in halves for s in half.samples(0, [])]
    assert sorted(both) == sorted(seen[:3])

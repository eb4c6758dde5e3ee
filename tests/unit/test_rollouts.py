"""Stages, order and seeds: a rollout depends on its own name alone, and is whole when it comes.

Letters: as in test_algorithm.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from megatron_srpo.algorithm import collect_groups
from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.resets import RULES
from megatron_srpo.rewards.exact import last_line
from megatron_srpo.rollouts import Roles, roll_out
from megatron_srpo.types import Completion, Prompt, Request, Score, Start
from tests.unit.builders import (
    NAMED,
    TOKENIZER,
    collect,
    config,
    ids,
    in_place,
    names,
    prompt,
    responses,
    samples_of,
    scripted,
    text_of,
)

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
    judge = in_place(recorder.reward)
    roles = Roles(generator=recorder, tokenizer=TOKENIZER, judge=judge, rule=rule)
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
    judge = in_place(last_line)
    roles = Roles(generator=generator, tokenizer=TOKENIZER, judge=judge, rule=rule)
    (sample, *_) = samples_of(collect_groups([prompt()], step=0, roles=roles, cfg=cfg))
    for array in (sample.token_ids, sample.loss_weight, sample.advantage, sample.logprob):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0

"""A plan's tokens against those of whole steps: the loop's own functions, on an engine that does
what the plan assumes of lengths, resets and pass rates."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from megatron_srpo.advantages import CREDITS
from megatron_srpo.algorithm import to_samples
from megatron_srpo.config import Config
from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.metrics import GENERATED, combine, rollout_sums
from megatron_srpo.plan.tokens import Stage, step_tokens
from megatron_srpo.retention import OwnAnswers
from megatron_srpo.types import Group
from tests.unit.builders import TOKENIZER, collect, config, prompt

NUM = 600
"""Prompts of a step: what is a mean in a plan is one here, up to a few percent."""
LETTERS = "xyzuv"
"""Of base rollouts, of suffixes, of their suffixes, ..."""


def answer(context: str, rng: random.Random) -> str:
    """Whole responses have 10 thoughts and 20 tokens, the last one an end of sequence; the last
    thought is right or wrong. The localizer names the thought in the middle, in a suffix the second
    of its own."""
    if context.endswith("?"):
        newest = max(LETTERS.index(letter) for letter in context if letter in LETTERS)
        first = context[4:].index(LETTERS[newest]) // 2
        return rf"\boxed{{{1 + (first + 1 if newest else 5)}}}"
    number, prefix = int(context[:3]), context[4:]
    depth = len(set(prefix) & set(LETTERS))
    verdict = "1" if rng.random() < pass_rate(number, len(prefix)) else "2"
    return f"{LETTERS[depth]}\n" * (9 - len(prefix) // 2) + verdict


def pass_rate(number: int, num_copied: int) -> float:
    """From a prompt, and from a state that it is reset to: evenly spread, and the one says nothing
    of the other (multiples of irrational numbers)."""
    if num_copied == 0:
        return (number + 0.5) / NUM
    return (number * 0.6180339887 + num_copied * 0.7548776662) % 1


def config_of(algorithm: dict[str, Any], **changes: Any) -> Config:
    return config(
        algorithm={"num_prompts": NUM} | algorithm,
        localize={"max_tokens": 20},
        rollout={"max_response_tokens": 40, "max_model_len": 128},
        **changes,
    )


def one_step(cfg: Config) -> tuple[FakeGenerator, list[Group]]:
    solution = ("x",) * 5 + ("right",) * 5
    prompts = [prompt(f"{i:03d}=", id=f"p{i}", solution=solution) for i in range(NUM)]
    generator = FakeGenerator(answer)
    return generator, collect(generator, *prompts, cfg=cfg)


METHODS: list[dict[str, Any]] = [
    {"resets": "none"},
    {"resets": "none", "max_redraws": 2},
    {"resets": "self"},
    {"resets": "self", "split": "2x3"},
    {"resets": "depth_matched"},
    {"resets": "oracle"},
    {"resets": "prompt"},
    {"resets": "self", "allocation": "dead"},
    {"resets": "self", "reset_rounds": 2},
    {"resets": "self", "reset_rounds": 4},
    {"resets": "self", "seeds": "extra_draws"},
    {"resets": "self", "seeds": "extra_draws", "split": "2x4", "num_rollouts": 8},
    {"resets": "self", "seeds": "extra_draws", "split": "2x4", "max_draws": 3},
]


@pytest.mark.parametrize("algorithm", METHODS, ids=str)
def test_a_step_s_stages_and_tokens_are_those_of_the_loop(algorithm: dict[str, Any]):
    cfg = config_of(algorithm)
    planned = step_tokens(cfg)
    generator, groups = one_step(cfg)
    calls = [batch for batch in generator.seen if batch]
    assert [stage.name for stage in planned.stages] == [
        {"extra": "suffix"}.get(batch[0].purpose, batch[0].purpose) for batch in calls
    ]
    for stage, batch in zip(planned.stages, calls, strict=True):
        assert stage.num == pytest.approx(len(batch), rel=0.02, abs=0.08 * NUM)
    metrics = combine([rollout_sums(groups, cfg)])
    localize = sum(s.num_generated for s in planned.stages if s.name == "localize")
    assert localize == pytest.approx(metrics.get("tokens/localize", 0.0), rel=0.1)
    assert planned.generated == pytest.approx(sum(metrics.get(n, 0.0) for n in GENERATED), rel=0.04)

    samples = to_samples(groups, CREDITS["group"](cfg), cfg)
    assert planned.sequences == len(samples)
    assert planned.trained == sum(len(sample.token_ids) for sample in samples)
    wanted = sum(np.count_nonzero(sample.loss_weight) for sample in samples)
    assert planned.wanted == pytest.approx(wanted, rel=0.03)


def test_contexts_are_as_long_as_the_requests_and_questions_are_read_whole():
    cfg = config_of({"resets": "self"})
    generator, _ = one_step(cfg)
    stages: tuple[Stage, ...] = step_tokens(cfg).stages
    for stage, batch in zip(stages, generator.seen, strict=True):
        mean = np.mean([len(request.context) for request in batch])
        assert stage.context == pytest.approx(mean, rel=0.03)
    base, localize, suffix = stages
    assert base.read == pytest.approx(4 * NUM / len(generator.seen[0]))  # once a prompt
    assert localize.read == localize.context and suffix.read == 0
    twice = cfg.localize.model_copy(update={"template": "{prompt}{response}{steps}"})
    asked = step_tokens(cfg.model_copy(update={"localize": twice})).stages[1]
    assert asked.read == 4 + 2 * 20


def test_chain_credit_has_a_loss_on_every_token_of_a_response_also_with_weight_0():
    for weight in (1.0, 0.0):
        cfg = config_of({"resets": "self"}, credit={"rule": "chain", "prefix_weight": weight})
        samples = to_samples(one_step(cfg)[1], CREDITS["chain"](cfg), cfg)
        wanted = sum(np.count_nonzero(sample.loss_weight) for sample in samples)
        assert step_tokens(cfg).wanted == wanted


@pytest.mark.parametrize("source", ["initial", "verified"])
def test_a_retention_loss_trains_on_so_many_questions_and_answers(source: str):
    cfg = config_of({"resets": "self"}, retention={"source": source, "num_samples": 7})
    _, groups = one_step(cfg)
    own = OwnAnswers(
        cfg=cfg, tokenizer=TOKENIZER, replica=0, num_replicas=1, gather=lambda value: [value]
    )
    samples = to_samples(groups, CREDITS["group"](cfg), cfg) + own.samples(0, groups)
    planned, without = step_tokens(cfg), step_tokens(config_of({"resets": "self"}))
    assert planned.sequences == len(samples)
    assert planned.trained == sum(len(sample.token_ids) for sample in samples)
    assert planned.wanted - without.wanted == 7 * 10
    assert planned.stages == without.stages
    labelled = config_of({"resets": "none"}, retention={"data": "answers.jsonl", "num_samples": 7})
    assert step_tokens(labelled).sequences == 8 * NUM + 7

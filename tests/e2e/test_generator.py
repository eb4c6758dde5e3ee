"""The vLLM engine against transformers, and what its requests promise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_srpo.config import RolloutConfig
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.hf_folder import read_tensors
from megatron_srpo.types import Completion, Request
from tests.tiny import reference_logprobs, write_policy


@pytest.fixture(scope="module")
def engine(policy: Path, mesh: Mesh, engines: list[object]) -> VllmGenerator:
    engine = VllmGenerator(policy, RolloutConfig(max_model_len=160), dtype="float32")
    engines.append(engine)
    return engine


def request(id: str, *, length: int = 20, temperature: float = 0.7, seed: int = 1) -> Request:
    context = np.random.default_rng(length).integers(2, 16, length).astype(np.int32)
    return Request(
        id=id,
        purpose="base",
        context=context,
        max_tokens=24,
        temperature=temperature,
        seed=seed,
    )


def run(engine: VllmGenerator, *requests: Request) -> dict[str, Completion]:
    return {answer.request_id: answer for answer in engine.generate(requests)}


def test_logprobs_are_those_of_the_tempered_distribution_that_was_sampled(
    engine: VllmGenerator, policy: Path
) -> None:
    asked = [request(f"r{i}", length=10 + 7 * i, seed=i) for i in range(6)]
    answers = run(engine, *asked)
    for one in asked:
        answer = answers[one.id]
        whole = np.concatenate([one.context, answer.token_ids])
        right = reference_logprobs(policy, whole, temperature=0.7)[len(one.context) - 1 :]
        np.testing.assert_allclose(answer.logprobs, right.detach().numpy(), atol=1e-5)


def test_what_is_drawn_depends_on_the_request_s_seed_and_not_on_its_neighbours(
    engine: VllmGenerator,
) -> None:
    together = run(engine, *[request(f"r{i}", seed=i) for i in range(8)])
    alone = run(engine, request("r3", seed=3))
    assert alone["r3"].token_ids.tolist() == together["r3"].token_ids.tolist()
    assert len({tuple(answer.token_ids) for answer in together.values()}) > 4


def test_a_sampled_end_of_sequence_is_part_of_the_completion(engine: VllmGenerator) -> None:
    answers = run(engine, *[request(f"r{i}", seed=i) for i in range(32)]).values()
    stopped = [answer for answer in answers if answer.finish_reason == "stop"]
    cut = [answer for answer in answers if answer.finish_reason == "length"]
    assert stopped and cut
    assert all(answer.token_ids[-1] == 1 for answer in stopped)
    assert all(1 not in answer.token_ids[:-1] for answer in answers)
    assert all(len(answer.token_ids) == 24 for answer in cut)


def test_a_prefix_is_served_from_the_cache_until_new_weights_arrive(
    engine: VllmGenerator, policy: Path
) -> None:
    long = request("long", length=70)
    run(engine, long)
    assert run(engine, long)["long"].num_cached_tokens == 64
    engine.load_weights(_stream(policy), version=3)
    after = run(engine, long)["long"]
    assert after.num_cached_tokens == 0
    assert after.weight_version == 3


def test_new_weights_are_the_ones_that_sample(
    engine: VllmGenerator, policy: Path, tmp_path: Path
) -> None:
    other = write_policy(tmp_path / "other", seed=5)
    engine.load_weights(_stream(other), version=1)
    one = request("one")
    answer = run(engine, one)["one"]
    engine.load_weights(_stream(policy), version=0)
    whole = np.concatenate([one.context, answer.token_ids])
    right = reference_logprobs(other, whole, temperature=0.7)[len(one.context) - 1 :]
    np.testing.assert_allclose(answer.logprobs, right.detach().numpy(), atol=1e-5)


def test_the_trainer_s_random_numbers_do_not_notice_the_engine(engine: VllmGenerator) -> None:
    torch.manual_seed(0)
    untouched = torch.rand(3)
    torch.manual_seed(0)
    run(engine, request("r", seed=4))
    assert torch.equal(torch.rand(3), untouched)


def _stream(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in read_tensors(folder):
        yield name, tensor
        if name == "model.embed_tokens.weight":
            yield "lm_head.weight", tensor

"""The vLLM engine against transformers, and what its requests promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput

from megatron_srpo.config_sections import RolloutConfig
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator, completion_of
from megatron_srpo.hf_folder import read_tensors
from megatron_srpo.types import AlarmError, Completion, Request, Tokens
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


def assert_scores(engine: VllmGenerator, folder: Path, sequences: list[Tokens]) -> None:
    for sequence, logprobs in zip(sequences, engine.score(sequences), strict=True):
        right = reference_logprobs(folder, sequence).detach().numpy()
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, right, rtol=0, atol=1e-5)


def sequences_of(*lengths: int) -> list[Tokens]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 16, length).astype(np.int32) for length in lengths]


def test_scores_are_the_log_probs_at_temperature_1_of_all_tokens_after_the_first(
    engine: VllmGenerator, policy: Path
) -> None:
    several = sequences_of(70, 2, 33, 3, 120, 32, 160)  # 160: as long as the engine can hold
    assert_scores(engine, policy, [*several, several[0], several[2]])


def test_a_sequence_without_a_second_token_has_no_scores(
    engine: VllmGenerator, policy: Path
) -> None:
    one, empty, two = sequences_of(1, 0, 2)
    assert [len(logprobs) for logprobs in engine.score([one, empty, two, one])] == [0, 0, 1, 0]
    assert engine.score([]) == []


def test_a_sequence_that_the_engine_cannot_hold_is_refused_before_anything_is_asked(
    engine: VllmGenerator, policy: Path
) -> None:
    with pytest.raises(ValueError, match="161 tokens is longer than the engine's 160"):
        engine.score(sequences_of(8, 161))
    assert_scores(engine, policy, sequences_of(8))


def test_a_sequence_whose_prefix_is_cached_still_gets_all_its_scores(
    engine: VllmGenerator, policy: Path
) -> None:
    long = request("long", length=70)
    answer = run(engine, long)["long"]
    assert run(engine, long)["long"].num_cached_tokens == 64
    assert_scores(engine, policy, [np.concatenate([long.context, answer.token_ids])])


def test_scores_follow_the_weights(engine: VllmGenerator, policy: Path, tmp_path: Path) -> None:
    other, long = write_policy(tmp_path / "other", seed=5), sequences_of(90)
    assert_scores(engine, policy, long)
    engine.load_weights(_stream(other), version=1)
    assert_scores(engine, other, long)
    engine.load_weights(_stream(policy), version=0)
    assert_scores(engine, policy, long)


def test_a_nucleus_leaves_out_unlikely_tokens_and_its_log_probs_are_renormalised(
    engine: VllmGenerator, policy: Path
) -> None:
    asked = [replace(request(f"r{i}", seed=i, temperature=1.0), top_p=0.5) for i in range(8)]
    answers = run(engine, *asked)
    for one in asked:
        answer = answers[one.id]
        whole = np.concatenate([one.context, answer.token_ids])
        probs = reference_probs(policy, whole)[len(one.context) - 1 : -1]
        for token, logprob, row in zip(answer.token_ids, answer.logprobs, probs, strict=True):
            order = np.argsort(-row)
            num_kept = int(np.searchsorted(np.cumsum(row[order]), 0.5)) + 1
            assert token in order[:num_kept]
            expected = np.log(row[token] / row[order[:num_kept]].sum())
            assert logprob == pytest.approx(expected, abs=1e-5)


def test_the_trainer_s_random_numbers_do_not_notice_the_engine(engine: VllmGenerator) -> None:
    torch.manual_seed(0)
    untouched = torch.rand(3)
    torch.manual_seed(0)
    run(engine, request("r", seed=4))
    engine.score(sequences_of(20))
    assert torch.equal(torch.rand(3), untouched)


def output(token_ids: list[int], logprobs: list[float], reason: str | None = "stop", id: str = "r"):
    flat = FlatLogprobs(token_ids=token_ids, logprobs=logprobs)
    answer = CompletionOutput(
        index=0,
        text="",
        token_ids=token_ids,
        cumulative_logprob=None,
        logprobs=flat,
        finish_reason=reason,
    )
    return RequestOutput(id, None, [5], None, [answer], True)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            output([4, 5, 6], [-1.0, float("nan"), float("-inf")], id="12.1/p/base/0"),
            "step 12, request 12.1/p/base/0: log-prob nan of token 1, and 2 of 3 are not finite",
        ),
        (output([], [], id="eval/p/0"), "request eval/p/0 came back without a token"),
        (
            output([4, 5], [-1.0], id="probe/3/8"),
            "weight sync 3, request probe/3/8 has 1 log-probs of 2 tokens",
        ),
        (output([4], [-1.0], "abort"), "request r ended with 'abort'"),
        (output([4], [-1.0], None), "request r ended with None"),
    ],
)
def test_a_completion_that_cannot_be_trained_on_is_an_alarm_that_names_its_request(
    broken: RequestOutput, message: str
) -> None:
    with pytest.raises(AlarmError) as alarm:
        completion_of(broken, weight_version=0)
    assert str(alarm.value) == message
    whole = completion_of(output([4], [-1.0]), weight_version=7)
    assert (whole.token_ids.tolist(), whole.weight_version) == ([4], 7)


def test_a_request_that_the_engine_forgets_is_an_alarm(
    engine: VllmGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(f"3/p{i}/base/0") for i in range(7)]
    inner = engine._llm.llm_engine
    with monkeypatch.context() as patched, pytest.raises(AlarmError) as alarm:
        patched.setattr(inner, "has_unfinished_requests", lambda: False)
        run(engine, *asked)
    assert str(alarm.value) == (
        "the rollout engine has forgotten step 3, requests 3/p0/base/0, 3/p1/base/0, 3/p2/base/0, "
        "3/p3/base/0, 3/p4/base/0 and 2 more"
    )
    inner.abort_request([one.id for one in asked])
    assert len(run(engine, *asked)) == 7


def test_a_request_that_the_engine_refuses_is_named(engine: VllmGenerator) -> None:
    with pytest.raises(VLLMValidationError, match="161") as refusal:
        run(engine, request("0/long/base/0", length=161))
    assert refusal.value.__notes__ == [
        "the rollout engine was at work on step 0, request 0/long/base/0"
    ]


def reference_probs(folder: Path, tokens: Tokens) -> np.ndarray:
    """[T, V] in float64, of the token behind each prefix."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0].softmax(-1).numpy()


def _stream(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in read_tensors(folder):
        yield name, tensor
        if name == "model.embed_tokens.weight":
            yield "lm_head.weight", tensor


@pytest.fixture
def unseeded(engine: VllmGenerator, monkeypatch: pytest.MonkeyPatch) -> VllmGenerator:
    """The same engine, with `rollout.seeding=engine`."""
    monkeypatch.setattr(engine, "seeding", "engine")
    return engine


def hot(seed: int) -> list[Request]:
    """As hot as vLLM allows: what is drawn is noise above all."""
    context = np.arange(2, 34, dtype=np.int32)
    return [
        Request(
            id=f"hot/{seed}/{index}",
            purpose="base",
            context=context,
            max_tokens=24,
            temperature=2.0,
            seed=seed if index == 0 else 7,
        )
        for index in range(3)
    ]


def test_an_engine_that_is_seeded_itself_draws_anew_at_every_token_and_for_every_request(
    unseeded: VllmGenerator, monkeypatch: pytest.MonkeyPatch
):
    """Torch's state is the trainer's again after each step: were that where the engine goes on,
    each token would be drawn with the noise of the one before."""
    states: list[bytes] = []
    monkeypatch.setattr(
        unseeded, "_before_step", lambda: states.append(unseeded._random_state.numpy().tobytes())
    )
    drawn = [tuple(c.token_ids.tolist()) for c in unseeded.generate(hot(1))]
    assert len({*drawn}) == 3
    assert len({*states}) == len(states) > 5


def test_its_draws_are_those_of_the_call_s_first_seed_and_the_trainer_s_state_stays(
    unseeded: VllmGenerator,
):
    def draw(seed: int) -> dict[str, tuple[int, ...]]:
        found = unseeded.generate(hot(seed))
        return {c.request_id[-1]: tuple(c.token_ids.tolist()) for c in found}

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert first == again and all(first[index] != other[index] for index in first)
    assert torch.equal(torch.get_rng_state(), before)


class SleepyLLM:
    """In place of vLLM's on a GPU: what was asked of it."""

    def __init__(self, error: str = "") -> None:
        self.asked: list[Any] = []
        self.llm_engine, self._asleep, self._error = self, set[str](), error

    def sleep(self, level: int) -> None:
        self.asked.append(level)
        self._asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        if self._error:
            raise RuntimeError(self._error)
        self.asked.append(tags)
        self._asleep -= {*tags}

    def is_sleeping(self) -> bool:
        return bool(self._asleep)


@pytest.fixture
def sleepy(engine: VllmGenerator, monkeypatch: pytest.MonkeyPatch) -> SleepyLLM:
    llm = SleepyLLM()
    monkeypatch.setattr(engine, "_llm", llm)
    monkeypatch.setattr(engine, "_awake", engine._awake)
    return llm


def test_it_sleeps_without_a_copy_in_host_memory_and_wakes_in_two_parts(
    engine: VllmGenerator, sleepy: SleepyLLM
):
    """Level 1 keeps the weights in host memory: 78 GB an engine was what vime 190 saw."""
    whole = engine.held()
    assert whole["engine weights"] > 0 and whole["engine kv_cache"] == 64 * 2**20
    engine.sleep()
    assert engine.held() == {"engine weights": 0, "engine kv_cache": 0}
    engine.wake("weights")
    assert engine.held() == whole | {"engine kv_cache": 0}
    engine.wake("kv_cache")
    assert sleepy.asked == [2, ["weights"], ["kv_cache"]] and engine.held() == whole


def test_asleep_it_takes_neither_requests_nor_weights(engine: VllmGenerator, sleepy: SleepyLLM):
    engine.sleep()
    with pytest.raises(AssertionError, match="awake are none"):
        next(engine.generate(hot(1)))
    with pytest.raises(AssertionError, match="no room for weights"):
        engine.load_weights(iter([]), version=1)
    with pytest.raises(AssertionError, match="kv_cache is woken, not weights"):
        engine.wake("kv_cache")
    engine.wake("weights")
    with pytest.raises(AssertionError, match=r"awake are \('weights',\)"):
        next(engine.generate(hot(1)))
    with pytest.raises(AssertionError, match="weights is woken, not kv_cache"):
        engine.wake("weights")


@pytest.mark.parametrize(
    "said, kind",
    [("CUDA Error: out of memory at cumem.cpp:93", torch.OutOfMemoryError), ("x", RuntimeError)],
)
def test_a_driver_without_room_for_it_is_exhausted_memory(
    engine: VllmGenerator, sleepy: SleepyLLM, said: str, kind: type[Exception]
):
    engine.sleep()
    sleepy._error = said
    with pytest.raises(kind) as caught:
        engine.wake("weights")
    assert type(caught.value) is kind

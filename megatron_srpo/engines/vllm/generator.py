"""Rollouts: a vLLM engine in this process as `protocols.Generator`, `Scorer`, `WeightReceiver`."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from megatron_srpo.config_sections import RolloutConfig
from megatron_srpo.protocols import EnginePart, NamedTensors
from megatron_srpo.types import AlarmError, Completion, Floats, Request, Tokens

CPU_ARGUMENTS: dict[str, Any] = {
    "enforce_eager": True,
    "worker_cls": "megatron_srpo.engines.vllm.cpu_worker.CPUEngineWorker",
    # The smallest block there: a cached prefix is reused in multiples of it.
    "block_size": 32,
    # vLLM 0.32 rewinds the generator of a seeded request whose prefill it cuts into chunks, and
    # CPU generators cannot be rewound.
    "enable_chunked_prefill": False,
}

GPU_ARGUMENTS: dict[str, Any] = {
    "enable_sleep_mode": True,
    # vLLM will not start unless this share of the GPU is free, and takes no notice of it otherwise:
    # `kv_cache_memory_bytes` says what it gets. A trainer holds the rest.
    "gpu_memory_utilization": 0.05,
}

FLAT: dict[str, Any] = {
    "flat_logprobs": True,
    "detokenize": False,
    "output_kind": RequestOutputKind.FINAL_ONLY,
}
"""Arrays of log-probs, no text, one answer."""
FP8 = "fp8_per_tensor"
"""Online quantization; "fp8" is that of folders that hold FP8 (config/quantization.py)."""
MOST_NAMED = 5
"""Requests in a message."""
ALL: tuple[EnginePart, ...] = ("weights", "kv_cache")
"""What sleeps and wakes, in the order in which it wakes."""


class VllmGenerator:
    """One replica: an engine, its weights' version, its prefix cache."""

    def __init__(
        self,
        folder: Path,
        cfg: RolloutConfig,
        *,
        dtype: Literal["float32", "bfloat16"],
        is_fp8: bool = False,
        has_weights: bool = True,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Torch's process group must exist already: the engine joins it (`external_launcher`).

        `is_fp8`: of the weights that are loaded the engine keeps FP8 copies of its own making, with
        one scale per tensor; activations are scaled as they come, head and embedding stay as they
        are.
        `before_step` is called before each engine step; what it raises ends `generate`. Without
        `has_weights` the folder's are not read: others come before anything is generated.
        """
        self._random_state = torch.get_rng_state()
        with self._own_random_state():
            self._llm = LLM(
                str(folder),
                dtype=dtype,
                quantization=FP8 if is_fp8 else None,
                max_model_len=cfg.max_model_len,
                tensor_parallel_size=cfg.tp,
                max_num_seqs=cfg.max_num_seqs,
                kv_cache_memory_bytes=cfg.kv_cache_bytes,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,  # requests carry their own seeds, or `generate` sets one
                load_format="auto" if has_weights else "dummy",
                **(GPU_ARGUMENTS if torch.cuda.is_available() else CPU_ARGUMENTS),
            )
        self.seeding: Literal["request", "engine"] = cfg.seeding
        """Of the next requests."""
        self.weight_bytes = sum(self._llm.collective_rpc(_weight_bytes))
        """Of this process's part of the model."""
        self._kv_cache_bytes = cfg.kv_cache_bytes
        self._awake: tuple[EnginePart, ...] = ALL
        self._max_model_len = cfg.max_model_len
        self._before_step = before_step
        self.weight_version = 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order in which they finish; the engine steps between them.

        Raises `AlarmError` for a request without a token, with a log-prob that is not finite, or
        that the engine forgets; what the engine raises has a note that names its requests.
        """
        has_seeds = self.seeding == "request"
        if requests and not has_seeds:
            self._seed(requests[0].seed)
        for request in requests:
            params = SamplingParams(
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed if has_seeds else None,
                logprobs=0,
                **FLAT,
            )
            self._add(request.id, request.context, params)
        for output in self._finished([request.id for request in requests]):
            yield completion_of(output, weight_version=self.weight_version)

    def score(self, sequences: Sequence[Tokens]) -> list[Floats]:
        """Implements `Scorer`; raises `ValueError` for a sequence that the engine cannot hold.

        All tokens but the last are a prompt, whose log-probs vLLM computes from the logits as they
        are, without temperature and without reading the prefix cache
        (vllm/v1/worker/gpu_model_runner.py, `_get_prompt_logprobs_dict`; sampling_params.py,
        `skip_reading_prefix_cache`). The last token, for which a prompt of the engine's full length
        would leave no room, is asked for by its id where the prompt's next token is drawn.
        """
        for sequence in sequences:
            if len(sequence) > self._max_model_len:
                raise ValueError(
                    f"a sequence of {len(sequence)} tokens is longer than the engine's "
                    f"{self._max_model_len}"
                )
        assert not self._llm.llm_engine.has_unfinished_requests(), (
            "another call's requests are running"
        )
        for index, sequence in enumerate(sequences):
            if len(sequence) > 1:
                last = [int(sequence[-1])]
                params = SamplingParams(
                    max_tokens=1, temperature=1.0, prompt_logprobs=0, logprob_token_ids=last, **FLAT
                )
                self._add(str(index), sequence[:-1], params)
        scored = [np.empty(0, dtype=np.float32) for _ in sequences]
        asked = [str(index) for index, sequence in enumerate(sequences) if len(sequence) > 1]
        for output in self._finished(asked):
            index = int(output.request_id)
            scored[index] = _scored(output)
            if len(scored[index]) != len(sequences[index]) - 1:
                raise AlarmError(f"sequence {index} got {len(scored[index])} log-probs")
        return scored

    def _add(self, id: str, context: Tokens, params: SamplingParams) -> None:
        # A sleeping engine takes requests, and then never has a step for them.
        assert self._awake == ALL, f"the rollout engine sleeps: awake are {self._awake or 'none'}"
        with _naming([id]):
            self._llm.llm_engine.add_request(id, {"prompt_token_ids": context.tolist()}, params)

    def _finished(self, ids: Sequence[str]) -> Iterator[RequestOutput]:
        """These requests' outputs, each of them once."""
        engine, unfinished = self._llm.llm_engine, dict.fromkeys(ids)
        while engine.has_unfinished_requests():
            self._before_step()
            with self._own_random_state(), _naming(unfinished):
                finished = engine.step()
            for output in finished:
                assert isinstance(output, RequestOutput)
                del unfinished[output.request_id]
                yield output
        if unfinished:
            raise AlarmError(f"the rollout engine has forgotten {_in_words(unfinished)}")

    def load_weights(self, named_tensors: NamedTensors, *, version: int) -> None:
        """Replaces the weights in place and drops every cached key and value of the old ones.

        vLLM takes in a layer's weights, quantizes them where it is to, and copies the result to
        where its graphs look for it (model_executor/model_loader/reload/layerwise.py): what calls
        the model's own `load_weights` instead would write bf16 into FP8. Tensors may be kept until
        all of a layer are there: they must not change.
        """
        assert "weights" in self._awake, "there is no room for weights: the rollout engine sleeps"
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if not self._llm.reset_prefix_cache():
            raise AlarmError("the prefix cache could not be reset: requests are still running")
        self.weight_version = version

    def sleep(self) -> None:
        """Implements `Sleeper`. Requests that were left behind are forgotten."""
        assert self._awake, "the rollout engine sleeps already"
        self._llm.sleep(level=2)  # level 1 would keep a copy of the weights in host memory
        self._awake = ()

    def wake(self, part: EnginePart) -> None:
        """Implements `Sleeper`."""
        expected = ALL[len(self._awake) :][:1]
        assert expected == (part,), f"{part} is woken, not {' or '.join(expected) or 'nothing'}"
        try:
            self._llm.wake_up(tags=[part])
        except RuntimeError as error:  # of the driver, by way of vLLM's allocator
            if "out of memory" not in str(error).lower():
                raise
            raise torch.OutOfMemoryError(f"no room for the rollout engine's {part}") from error
        self._awake = (*self._awake, part)
        # It says nothing where it was asked for what is awake, or not for all that sleeps.
        assert self._llm.llm_engine.is_sleeping() == (self._awake != ALL)

    def held(self) -> dict[str, int]:
        sizes = {"weights": self.weight_bytes, "kv_cache": self._kv_cache_bytes}
        return {f"engine {part}": sizes[part] * (part in self._awake) for part in ALL}

    def _seed(self, seed: int) -> None:
        """Of all that vLLM draws with where a request has no seed: its own state of torch's CPU
        generator, the GPU's, and numpy's, from which newer runners take a request's seed. The
        ranks of an engine set the same."""
        self._random_state = torch.Generator().manual_seed(seed).get_state()
        np.random.seed(seed % 2**32)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """vLLM reseeds and draws from torch's global generator; the trainer's must not notice, and
        the engine's must go on where it stood: with the trainer's, every step drew alike."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = torch.get_rng_state()
            torch.set_rng_state(outer)

    def close(self) -> None:
        """Before the process group that the engine joined is destroyed."""
        self._llm.llm_engine.engine_core.shutdown()


def completion_of(output: RequestOutput, *, weight_version: int) -> Completion:
    """Of a request that is done; see `VllmGenerator.generate` for what is refused."""
    answer = output.outputs[0]
    assert isinstance(answer.logprobs, FlatLogprobs)
    logprobs = np.array(answer.logprobs.logprobs, dtype=np.float32)
    named = _in_words([output.request_id])
    if answer.finish_reason not in ("stop", "length"):
        raise AlarmError(f"{named} ended with {answer.finish_reason!r}")
    if not answer.token_ids:
        raise AlarmError(f"{named} came back without a token")
    if len(logprobs) != len(answer.token_ids):
        raise AlarmError(f"{named} has {len(logprobs)} log-probs of {len(answer.token_ids)} tokens")
    _check_finite(logprobs, named)
    return Completion(
        request_id=output.request_id,
        token_ids=np.array(answer.token_ids, dtype=np.int32),
        logprobs=logprobs,
        finish_reason=answer.finish_reason,
        num_cached_tokens=output.num_cached_tokens or 0,
        weight_version=weight_version,
    )


def _check_finite(logprobs: Floats, named: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(logprobs))
    if len(wrong):
        raise AlarmError(
            f"{named}: log-prob {logprobs[wrong[0]]} of token {wrong[0]}, and {len(wrong)} of "
            f"{len(logprobs)} are not finite"
        )


@contextlib.contextmanager
def _naming(ids: Collection[str]) -> Iterator[None]:
    """What the engine raises has a note of whom it worked for."""
    try:
        yield
    finally:
        if error := sys.exception():
            error.add_note(f"the rollout engine was at work on {_in_words(ids)}")


def _in_words(ids: Collection[str]) -> str:
    """Requests of a step begin with its number (and that of the attempt), probes with the sync's.

    >>> _in_words(["12.1/p/base/0", "12.1/q/base/0"]), _in_words(["eval/p/0"])
    ('step 12, requests 12.1/p/base/0, 12.1/q/base/0', 'request eval/p/0')
    """
    first = [*itertools.islice(ids, MOST_NAMED)]
    kind, _, rest = first[0].partition("/")
    step = kind.partition(".")[0]
    words = f"step {step}, " if step.isdigit() and rest else ""
    if kind == "probe":
        words = f"weight sync {rest.partition('/')[0]}, "
    words += f"request{'s' * (len(ids) > 1)} {', '.join(first)}"
    return words + (f" and {len(ids) - len(first)} more" if len(ids) > len(first) else "")


def _scored(output: RequestOutput) -> Floats:
    """[T - 1]: the prompt's tokens after the first, then the token that was asked for by its id."""
    prompt, (answer,) = output.prompt_logprobs, output.outputs
    assert isinstance(prompt, FlatLogprobs) and isinstance(answer.logprobs, FlatLogprobs)
    # Behind the log-prob of the token that was drawn, which nobody wants.
    _, last = answer.logprobs.logprobs
    logprobs = np.array([*prompt.logprobs, last], dtype=np.float32)
    _check_finite(logprobs, f"sequence {output.request_id}")
    return logprobs


def _weight_bytes(worker: Any) -> int:
    """Of this process's part of the model."""
    parameters = worker.get_model().parameters()
    return sum(parameter.untyped_storage().nbytes() for parameter in parameters)

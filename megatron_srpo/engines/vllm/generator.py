"""Rollouts: a vLLM engine in this process as `protocols.Generator`, `Scorer`, `WeightReceiver`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from megatron_srpo.config import RolloutConfig
from megatron_srpo.protocols import NamedTensors
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

FLAT: dict[str, Any] = {
    "flat_logprobs": True,
    "detokenize": False,
    "output_kind": RequestOutputKind.FINAL_ONLY,
}
"""Arrays of log-probs, no text, one answer."""


class VllmGenerator:
    """One replica: an engine, its weights' version, its prefix cache."""

    def __init__(
        self,
        folder: Path,
        cfg: RolloutConfig,
        *,
        dtype: Literal["float32", "bfloat16"],
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Torch's process group must exist already: the engine joins it (`external_launcher`).

        `before_step` is called before each engine step; what it raises ends `generate`.
        """
        with _own_random_state():
            self._llm = LLM(
                str(folder),
                dtype=dtype,
                max_model_len=cfg.max_model_len,
                tensor_parallel_size=cfg.tp,
                max_num_seqs=cfg.max_num_seqs,
                kv_cache_memory_bytes=cfg.kv_cache_bytes,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,  # requests carry their own seeds
                **({} if torch.cuda.is_available() else CPU_ARGUMENTS),
            )
        self._max_model_len = cfg.max_model_len
        self._before_step = before_step
        self.weight_version = 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order in which they finish; the engine steps between them."""
        for request in requests:
            params = SamplingParams(
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                logprobs=0,
                **FLAT,
            )
            self._add(request.id, request.context, params)
        for output in self._finished():
            yield self._completion(output)

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
        for output in self._finished():
            index = int(output.request_id)
            scored[index] = _scored(output)
            if len(scored[index]) != len(sequences[index]) - 1:
                raise AlarmError(f"sequence {index} got {len(scored[index])} log-probs")
        return scored

    def _add(self, id: str, context: Tokens, params: SamplingParams) -> None:
        self._llm.llm_engine.add_request(id, {"prompt_token_ids": context.tolist()}, params)

    def _finished(self) -> Iterator[RequestOutput]:
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            self._before_step()
            with _own_random_state():
                finished = engine.step()
            for output in finished:
                assert isinstance(output, RequestOutput)
                yield output

    def _completion(self, output: RequestOutput) -> Completion:
        answer = output.outputs[0]
        assert isinstance(answer.logprobs, FlatLogprobs)
        logprobs = np.array(answer.logprobs.logprobs, dtype=np.float32)
        if answer.finish_reason not in ("stop", "length"):
            raise AlarmError(f"request {output.request_id} ended with {answer.finish_reason!r}")
        if len(logprobs) != len(answer.token_ids) or not np.isfinite(logprobs).all():
            raise AlarmError(f"request {output.request_id} has log-probs {logprobs}")
        return Completion(
            request_id=output.request_id,
            token_ids=np.array(answer.token_ids, dtype=np.int32),
            logprobs=logprobs,
            finish_reason=answer.finish_reason,
            num_cached_tokens=output.num_cached_tokens or 0,
            weight_version=self.weight_version,
        )

    def load_weights(self, named_tensors: NamedTensors, *, version: int) -> None:
        """Replaces the weights in place and drops every cached key and value of the old ones."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if not self._llm.reset_prefix_cache():
            raise AlarmError("the prefix cache could not be reset: requests are still running")
        self.weight_version = version

    def close(self) -> None:
        """Before the process group that the engine joined is destroyed."""
        self._llm.llm_engine.engine_core.shutdown()


def _scored(output: RequestOutput) -> Floats:
    """[T - 1]: the prompt's tokens after the first, then the token that was asked for by its id."""
    prompt, (answer,) = output.prompt_logprobs, output.outputs
    assert isinstance(prompt, FlatLogprobs) and isinstance(answer.logprobs, FlatLogprobs)
    # Behind the log-prob of the token that was drawn, which nobody wants.
    _, last = answer.logprobs.logprobs
    logprobs = np.array([*prompt.logprobs, last], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise AlarmError(f"sequence {output.request_id} has log-probs {logprobs}")
    return logprobs


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """vLLM reseeds and draws from torch's global generator; the trainer's must not notice."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)

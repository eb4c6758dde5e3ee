"""Every knob of a run: sections (`config_sections.py`), and what must fit between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import model_validator

from megatron_srpo.config_method import (
    AlgorithmConfig,
    CreditConfig,
    LocalizeConfig,
    RetentionConfig,
    ThoughtConfig,
)
from megatron_srpo.config_precision import (
    Fp8Config,
    MismatchConfig,
    Precision,
    precision_of,
    with_defaults,
)
from megatron_srpo.config_sections import (
    CheckpointConfig,
    ColocationConfig,
    Count,
    DataConfig,
    DeadlineConfig,
    EvalConfig,
    KernelConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    Positive,
    RolloutConfig,
    Section,
    SftConfig,
)
from megatron_srpo.types import Sandbox


class Config(Section):
    run_dir: Path
    """Everything that a run leaves. An unfinished run of the same config goes on; others must not
    be there."""
    model: Path
    """Hugging Face folder of the policy to train."""
    seed: int = 0
    num_steps: Count = 100
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations in the trainer and in the rollout engine."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers the trainer has: Megatron-Core's own or Transformer Engine's. auto: the latter
    in bf16, where it and a GPU are there."""
    fp8: Fp8Config = Fp8Config()
    max_logprob_diff: Positive = 1e-5
    """The run stops where trainer and rollout engine differ by more nats on any token: on a trained
    one in float32, on the probe after a sync always. In bf16 0.5 by default, in FP8 1."""
    mismatch: MismatchConfig = MismatchConfig()
    parallel: ParallelConfig = ParallelConfig()
    colocation: ColocationConfig = ColocationConfig()
    kernels: KernelConfig = KernelConfig()
    micro_batch_tokens: Count = 16384
    """A forward pass holds at most so many tokens (or one sequence, if that is longer)."""
    reward: str = "boxed"
    """last_line, boxed: the answer as text; math_verify, math_string; choice, yes_no, short, and
    each with _lax; code: its last program, on the tests in `answer`; or yours, FILE.py:FUNCTION.
    math_verify, code and yours run in processes of their own."""
    second_reward: str | None = None
    """Is asked about every response, too: how often both agree is a metric, and nothing else."""
    reward_workers: Count = 8
    """Processes of one reward and rollout engine at most. They start when all others are busy."""
    reward_timeout_s: Positive = 60.0
    """For one response, in seconds. A reward in processes that takes longer, or whose process dies,
    is asked once more; then the response has no verdict."""
    sandbox: Sandbox = "namespaces"
    """The weakest in which programs may run, of bubblewrap, namespaces, limits."""
    data: DataConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    thoughts: ThoughtConfig = ThoughtConfig()
    localize: LocalizeConfig = LocalizeConfig()
    rollout: RolloutConfig = RolloutConfig()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    retention: RetentionConfig = RetentionConfig()
    eval: EvalConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    log: LogConfig = LogConfig()
    sft: SftConfig | None = None
    """For `megatron-srpo sft`."""

    @property
    def precision(self) -> Precision:
        return precision_of(self.dtype, self.fp8.recipe, self.fp8.rollout)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_precision(cls, given: Any) -> Any:
        return with_defaults(cast(dict[str, Any], given)) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fp8_fits(self) -> Config:
        fp8 = self.fp8
        if self.precision == "fp8" and self.dtype != "bfloat16":
            raise ValueError(f"fp8 needs dtype=bfloat16, not {self.dtype}")
        if fp8.recipe != "none" and self.backend == "local":
            raise ValueError(
                f"fp8.recipe={fp8.recipe} needs Transformer Engine's layers: Megatron-Core's own "
                "would ignore it; leave backend=local out"
            )
        if fp8.param_gather and self.loss.kl_coef:
            raise ValueError(
                "fp8.param_gather does not go with loss.kl_coef: weights held in FP8 cannot change "
                "places with the reference policy's"
            )
        if fp8.param_gather and fp8.recipe == "mxfp8" and self.parallel.overlap:
            raise ValueError(
                "fp8.param_gather with fp8.recipe=mxfp8 does not go with parallel.overlap: weights "
                "on their way and gradients share a buffer"
            )
        if fp8.param_gather and fp8.recipe == "mxfp8" and "weights" in self.colocation.park:
            raise ValueError(
                "colocation.park=weights does not go with fp8.param_gather and fp8.recipe=mxfp8, "
                "whose weights are in no buffer and would stay on the GPU"
            )
        return self

    @model_validator(mode="after")
    def _answer_formats_are_asked_for(self) -> Config:
        formats = {"data": self.data.answer_format}
        formats |= {
            f"eval.sets.{name}": each.answer_format for name, each in self.eval.sets.items()
        }
        for name, answer_format in formats.items():
            if answer_format and "{answer_format}" not in self.data.template:
                raise ValueError(
                    f"{name}.answer_format has no place: data.template does not name it"
                )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Config:
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if longest > self.rollout.max_model_len:
            raise ValueError(
                f"rollout.max_model_len={self.rollout.max_model_len} is less than "
                f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}"
            )
        asks = self.algorithm.resets in ("self", "depth_matched")
        if asks and longest + self.localize.max_tokens > self.rollout.max_model_len:
            raise ValueError(
                f"rollout.max_model_len={self.rollout.max_model_len} leaves no room to localize: a "
                f"prompt, its response and localize.max_tokens make up to "
                f"{longest + self.localize.max_tokens} tokens, and the template's own words"
            )
        if self.thoughts.max_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"thoughts.max_tokens={self.thoughts.max_tokens} is more than a whole response, "
                f"rollout.max_response_tokens={self.rollout.max_response_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _own_answers_are_given(self) -> Config:
        silent = ("none", "random", "oracle", "prompt", "dial")
        if self.retention.source != "labelled" and self.algorithm.resets in silent:
            raise ValueError(
                f"retention.source={self.retention.source} learns from the policy's answers: with "
                f"algorithm.resets={self.algorithm.resets} it is never asked"
            )
        return self

    @model_validator(mode="after")
    def _a_reward_is_given_up_before_the_run(self) -> Config:
        if self.reward_timeout_s >= self.deadlines.reward_s:
            raise ValueError(
                f"deadlines.reward_s={self.deadlines.reward_s:g} must be longer than one attempt, "
                f"reward_timeout_s={self.reward_timeout_s:g}"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_state_can_be_loaded(self) -> Config:
        of_sections = {"optimizer": self.optimizer}
        if self.sft is not None:
            of_sections["sft.optimizer"] = self.sft.optimizer
        for section, optimizer in of_sections.items():
            self._check_offload(f"{section}.offload_fraction", optimizer.offload_fraction)
        return self

    def _check_offload(self, name: str, fraction: float) -> None:
        if fraction and self.dtype == "float32":
            raise ValueError(
                f"{name}={fraction:g} needs dtype=bfloat16: Megatron cannot load the state of "
                "float32 parameters from host memory"
            )
        if fraction and self.fp8.param_gather:
            raise ValueError(
                f"{name} does not go with fp8.param_gather, whose weights are written on the GPU"
            )

    @model_validator(mode="after")
    def _nucleus_has_no_ratios(self) -> Config:
        if self.rollout.top_p < 1 and self.loss.importance != "none":
            raise ValueError(
                f"loss.importance={self.loss.importance} needs log-probs over the whole "
                f"vocabulary: rollout.top_p must be 1, not {self.rollout.top_p:g}"
            )
        return self

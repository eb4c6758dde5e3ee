"""Every knob on one page: typed, validated, frozen. Lengths are in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of fields: frozen, and without a place for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(Section):
    train: Path
    """JSONL or parquet: `prompt` (text or chat messages), `answer`, optional `id`, `solution`."""
    eval: Path
    """Held-out problems, same columns."""
    max_prompt_tokens: Count = 1024
    long_prompts: Literal["error", "drop"] = "error"
    """What to do with longer prompts; dropped ones are counted and named."""


class AlgorithmConfig(Section):
    resets: str = "self"
    """none (GRPO); random (RRPO); self (SRPO): the thought that the policy blames; oracle: the
    first wrong one, where the task knows it; depth_matched: as deep as `self` went for another
    seed (a control); or your own rule, FILE.py:CLASS."""
    num_prompts: Count = 16
    """Per step, over all replicas."""
    num_rollouts: Count = 8
    """N: trained rollouts per prompt, base and suffix together."""
    split: Annotated[str, Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*$")] = "1x4"
    """SEEDSxSUFFIXES: of the N rollouts so many restart from failed ones; the rest is the base."""
    seeds: Literal["in_group", "extra_draws"] = "in_group"
    """in_group: the first failed base rollouts, which stay in their group. extra_draws: fresh ones
    are drawn until enough have failed; those are reset and not trained (the paper's release)."""
    max_draws: Count = 12
    """Fresh rollouts of a prompt at most, with `seeds=extra_draws`."""
    reset_offset: CountOrZero = 0
    """Resets go back so many thoughts further than the rule says."""
    empty_prefix: Literal["merge", "separate"] = "merge"
    """merge: rollouts that left the same state are one group, whatever led there. separate: each
    reset has a group of its own, also one to the bare prompt (the paper's release)."""
    truncated: Literal["train", "mask"] = "train"
    """mask: a response cut by its length counts in its group's statistics and not in the loss."""
    max_redraws: CountOrZero = 0
    """A prompt whose every group has equal rewards is drawn anew up to so many times."""

    @property
    def num_seeds(self) -> int:
        """Failed rollouts of a prompt that are reset."""
        return 0 if self.resets == "none" else int(self.split.split("x")[0])

    @property
    def num_suffixes(self) -> int:
        """Rollouts from each reset state."""
        return int(self.split.split("x")[1])

    @property
    def num_base(self) -> int:
        """Fresh rollouts per prompt."""
        return self.num_rollouts - self.num_seeds * self.num_suffixes

    @model_validator(mode="after")
    def _split_fits(self) -> AlgorithmConfig:
        again = self.num_seeds * self.num_suffixes
        if self.num_base < 0:
            raise ValueError(
                f"num_rollouts={self.num_rollouts} does not fit split={self.split}, "
                f"which alone makes {again}"
            )
        if self.seeds == "in_group" and self.num_base < self.num_seeds:
            raise ValueError(
                f"num_rollouts={self.num_rollouts} with split={self.split} has {self.num_base} "
                f"base rollouts and needs {self.num_seeds} failed ones among them; give more "
                "num_rollouts, or seeds=extra_draws"
            )
        num_drawn = self.num_base + self.num_seeds
        if self.num_seeds and self.seeds == "extra_draws" and self.max_draws < num_drawn:
            raise ValueError(
                f"max_draws={self.max_draws} is less than the {self.num_base} base rollouts and "
                f"{self.num_seeds} seeds that are drawn"
            )
        return self


class CreditConfig(Section):
    rule: str = "group"
    """group: (reward - baseline) / std within a group, on the tokens that a rollout sampled
    itself; or your own rule, FILE.py:CLASS."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """leave_one_out: the mean of the group's other rewards."""
    std: Literal["population", "sample", "none"] = "population"
    """What the difference is divided by."""
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """sequence_mean: over sequences, of the means over their tokens. token_mean: over tokens."""


class LossConfig(Section):
    surrogate: Literal["reinforce", "ppo"] = "reinforce"
    """reinforce: advantage x log-prob (the paper). ppo: advantage x clipped ratio to the policy
    before the step's first update."""
    clip_low: Fraction = 0.2
    """ppo: the ratio counts down to 1 - clip_low ..."""
    clip_high: Positive = 0.2
    """... and up to 1 + clip_high."""
    kl_coef: NonNegative = 0.0
    """Of the k3 estimate of KL(policy, initial policy), per trained token; 0: no reference."""
    importance: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    """Weights trainer / rollout engine, of a token or of a whole response: larger ones than
    `importance_cap` are cut to it (truncate), or their tokens left out (mask)."""
    importance_cap: Positive = 2.0
    updates_per_batch: Count = 1
    """Optimizer steps per step: a step's prompts are divided among them."""


class ThoughtConfig(Section):
    delimiter: Annotated[str, Field(min_length=1)] = "</thought>"
    """Ends a thought and belongs to it."""
    max_tokens: Count = 256
    """A longer thought is cut there; a reset leaves at least this much room."""


class LocalizeConfig(Section):
    template: str = (
        "{prompt}\n\n{steps}\nThe final answer is wrong. Find the step that went wrong first: the "
        "first one that does not follow from the problem and the steps before it. Do not solve "
        "the problem again. Finish with \\boxed{{step number}}.\n"
    )
    """Asks the policy about its failed response. Fields: {prompt} {response} {steps} (numbered)."""
    chat: bool = False
    """Send it as a user message through the chat template."""
    parser: Literal["boxed", "verdicts"] = "boxed"
    """boxed: the last \\boxed{number}. verdicts: one + or - a thought up to the first -."""
    temperature: NonNegative = 0.3
    max_tokens: Count = 1024
    fallback: Literal["restart", "random", "skip"] = "restart"
    """If the answer names no thought: go back to the prompt, to a random thought, or nowhere (the
    reset's rollouts are then fresh ones)."""


class RolloutConfig(Section):
    tp: Count = 1
    """Processes that hold one rollout engine together (vLLM's tensor parallel size)."""
    max_response_tokens: Count = 1024
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 the engine's log-probs are those of the nucleus: they are then neither compared
    with the trainer's nor used as importance weights."""
    max_model_len: Count = 4096
    """Longest sequence in the engine, a localization question with its answer included."""
    max_num_seqs: Count = 256
    """Sequences that decode together."""
    kv_cache_bytes: Count = 64 * 2**20


class OptimizerConfig(Section):
    lr: NonNegative = 1e-6
    min_lr: NonNegative = 0.0
    """Where `decay` ends."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Over all steps of the run."""
    warmup_steps: CountOrZero = 0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_grad: Positive = 1.0
    """Largest global gradient norm."""

    @model_validator(mode="after")
    def _min_below_peak(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is larger than lr={self.lr}")
        return self


class ParallelConfig(Section):
    tp: Count = 1
    """Processes that share each layer of the policy (tensor parallel, and sequence parallel)."""
    pp: Count = 1
    """Stages of consecutive layers (pipeline parallel). The rest is data parallel."""
    vpp: Count = 1
    """Parts of each stage, which then holds so many separate runs of layers (interleaved)."""
    cp: Count = 1
    """Processes that share each sequence (context parallel)."""
    ep: Count = 1
    """Processes that share the experts of a stage; each expert is whole on one of them."""
    recompute: Literal["none", "attention", "full"] = "none"
    """What is computed again in the backward pass instead of kept: memory against time."""
    overlap: bool = False
    """Gradients and parameters travel between processes while others are computed."""


class KernelConfig(Section):
    head: Literal["fused", "reference"] = "fused"
    """From hidden states to the loss. fused: log-probs of tokens that are trained on, in chunks of
    the vocabulary, then one operation. reference: by way of all logits, with Megatron's cross
    entropy, then many small operations."""


class RetentionConfig(Section):
    data: Path | None = None
    """Labelled localization demonstrations (`prompt`, `response`); null: no such loss."""
    num_samples: Count = 12
    """Demonstrations per step."""
    weight: NonNegative = 0.1
    """Of their mean cross entropy, beside the policy loss."""


class EvalConfig(Section):
    every: Count = 10
    """Steps between evaluations; also before the first step and after the last."""
    num_prompts: Count = 256
    """The first so many of the held-out set."""
    temperature: NonNegative = 1.0
    """0: greedy."""
    num_samples: Count = 1
    """Responses per problem."""
    pass_at: tuple[Count, ...] = (1,)
    """The ks of pass@k, each at most `num_samples`."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalConfig:
        if not self.pass_at or max(self.pass_at) > self.num_samples:
            raise ValueError(
                f"pass_at={list(self.pass_at)} needs one k at least, none above "
                f"num_samples={self.num_samples}"
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples={self.num_samples} greedy responses would be the same")
        return self


class CheckpointConfig(Section):
    every: CountOrZero = 0
    """Steps between checkpoints, also after the last step; 0: none. A run that was stopped goes on
    from the newest."""
    keep_last: Count = 2
    """The newest so many stay ..."""
    keep_every: CountOrZero = 0
    """... and those of every so many steps; 0: no others."""
    asynchronous: bool = True
    """The run goes on while a checkpoint is being written."""

    @model_validator(mode="after")
    def _kept_ones_are_made(self) -> CheckpointConfig:
        if self.every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of every={self.every}"
            )
        return self


class DeadlineConfig(Section):
    """Seconds without a sign of life (a change of phase, an engine step, a micro-batch) after which
    all ranks show where they are and end."""

    generate_s: Positive = 1800
    """In the rollout engine."""
    reward_s: Positive = 1800
    wait_s: Positive = 14400
    """For other rollout engines, whose own deadline is `generate_s`."""
    train_s: Positive = 1800
    sync_s: Positive = 1800
    save_s: Positive = 1800
    """Checkpoints, also the one of a run that was asked to stop, and the journal."""
    other_s: Positive = 3600
    """Building the engines, and all that has no name."""


class LogConfig(Section):
    wandb: bool = False
    """Offline unless WANDB_API_KEY or WANDB_MODE is set."""
    wandb_project: str = "megatron_srpo"
    tensorboard: bool = False


class SftConfig(Section):
    run_dir: Path
    model: Path
    """Hugging Face folder that the warm start begins with."""
    data: Path
    """JSONL or parquet: `prompt`, `response`."""
    num_steps: Count = 1000
    batch_size: Count = 64
    """Demonstrations per step, over all ranks."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)


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
    max_logprob_diff: Positive = 1e-5
    """The run stops where trainer and rollout engine differ by more nats on any token."""
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelConfig = KernelConfig()
    micro_batch_tokens: Count = 16384
    """A forward pass holds at most so many tokens (or one sequence, if that is longer)."""
    reward: str = "boxed"
    """last_line, boxed: where the response's answer stands, to be compared with `answer` as text;
    or your own reward, FILE.py:FUNCTION, which runs in a process of its own."""
    reward_timeout_s: Positive = 60.0
    """For one response, in seconds. A reward of yours that takes longer, or whose process dies, is
    asked once more; then the response has no verdict."""
    data: DataConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    thoughts: ThoughtConfig = ThoughtConfig()
    localize: LocalizeConfig = LocalizeConfig()
    rollout: RolloutConfig = RolloutConfig()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    retention: RetentionConfig = RetentionConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    log: LogConfig = LogConfig()
    sft: SftConfig | None = None
    """For `megatron-srpo sft`."""

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
    def _a_reward_is_given_up_before_the_run(self) -> Config:
        if 2 * self.reward_timeout_s >= self.deadlines.reward_s:
            raise ValueError(
                f"deadlines.reward_s={self.deadlines.reward_s:g} must be longer than two attempts "
                f"of reward_timeout_s={self.reward_timeout_s:g}"
            )
        return self

    @model_validator(mode="after")
    def _nucleus_has_no_ratios(self) -> Config:
        if self.rollout.top_p < 1 and self.loss.importance != "none":
            raise ValueError(
                f"loss.importance={self.loss.importance} needs log-probs over the whole "
                f"vocabulary: rollout.top_p must be 1, not {self.rollout.top_p:g}"
            )
        return self

    @model_validator(mode="after")
    def _template_formats(self) -> Config:
        try:
            self.localize.template.format(prompt="", response="", steps="")
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"localize.template: {error!r} is none of {{prompt}} {{response}} {{steps}} "
                "(a literal brace is written twice)"
            ) from error
        return self

"""The knobs of one part of a run each: typed, validated, frozen. Lengths are in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of fields: frozen, and without a place for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def check_template(name: str, template: str, fields: Sequence[str]) -> list[str]:
    """The fields that it asks for. Raises `ValueError` if one is none of `fields`, as it stands."""
    known = " ".join(f"{{{field}}}" for field in fields)
    hint = f"fields are {known}, a literal brace is written twice"
    try:
        parts = [*Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"{name}: {error} ({hint})") from error
    asked = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
    for field, spec, conversion in asked:
        if field not in fields or spec or conversion:
            raise ValueError(f"{name}: {{{field}}} is not known ({hint})")
    return [field for field, _, _ in asked]


class DataConfig(Section):
    train: Path
    """JSONL or parquet: `prompt` (text or chat messages), `answer`, optional `id`, `solution`."""
    template: str = "{prompt}"
    """What the policy is given, unless a prompt is chat messages. Fields: {prompt} {answer_format}
    {delimiter} (of `thoughts`)."""
    chat: bool = False
    """Send it as a user message through the chat template."""
    answer_format: str = ""
    """What is asked of the answer's form; an evaluation set may have its own."""
    max_prompt_tokens: Count = 1024
    long_prompts: Literal["error", "drop"] = "error"
    """What to do with longer prompts; dropped ones are counted and named."""

    @model_validator(mode="after")
    def _template_formats(self) -> DataConfig:
        fields = ("prompt", "answer_format", "delimiter")
        if "prompt" not in check_template("template", self.template, fields):
            raise ValueError("template: has no {prompt}: the policy would not be asked")
        return self


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
    seeding: Literal["request", "engine"] = "request"
    """request: what is drawn depends on the run's seed and the request alone. engine: also on who
    is drawn with it; on a GPU that is faster (vLLM draws for each seeded request by itself)."""


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
    offload_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """This share of Adam's state lives in host memory, where its part of a step is computed
    (Megatron's optimizer_cpu_offload). Needs a GPU, Transformer Engine and bfloat16."""

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


class ColocationConfig(Section):
    """On a GPU, where trainer and rollout engine take turns; without one nothing moves."""

    park: tuple[Literal["optimizer", "gradients", "weights"], ...] = ("optimizer", "gradients")
    """What of the trainer leaves the GPU while the rollout engine is awake, for pinned host memory
    (gradients are forgotten). Without its weights the trainer judges what a weight sync has
    brought before it trains, not at once."""

    @field_validator("park")
    @classmethod
    def _once_each(cls, park: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(park)) < len(park):
            raise ValueError(f"{list(park)} names something twice")
        return park


class KernelConfig(Section):
    head: Literal["fused", "reference"] = "fused"
    """From hidden states to the loss. fused: log-probs of tokens that are trained on, in chunks of
    the vocabulary, then one operation. reference: by way of all logits, with Megatron's cross
    entropy, then many small operations."""


class EvalSet(Section):
    """Held-out problems of one kind."""

    data: Path
    """Same columns as `data.train`."""
    reward: str | None = None
    """null: the run's `reward` and `second_reward`."""
    second_reward: str | None = None
    answer_format: str | None = None
    """null: `data.answer_format`."""

    @model_validator(mode="after")
    def _a_second_has_a_first(self) -> EvalSet:
        if self.second_reward is not None and self.reward is None:
            raise ValueError(f"second_reward={self.second_reward} needs a `reward` beside it")
        return self


class EvalConfig(Section):
    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_+-]+$")], EvalSet] = Field(min_length=1)
    """By name: metrics are `eval/<name>/...`. An override adds to the file's sets, or changes them;
    `eval.sets.NAME=null` leaves one out."""
    every: Count = 10
    """Steps between evaluations; also before the first step and after the last."""
    num_prompts: Count = 256
    """The first so many of each set."""
    greedy: bool = False
    """One more response per problem, at temperature 0."""
    temperature: Positive = 1.0
    """Of the other responses."""
    num_samples: CountOrZero = 1
    """Responses per problem and seed."""
    num_seeds: Count = 1
    """Evaluations that are independent of each other: from two on, there are intervals."""
    pass_at: tuple[Count, ...] = (1,)
    """The ks of pass@k, each at most `num_samples`."""

    @field_validator("sets", mode="before")
    @classmethod
    def _null_is_no_set(cls, sets: Any) -> Any:
        """So that an override can leave out one of the file's sets."""
        if not isinstance(sets, dict):
            return sets
        return {name: each for name, each in cast(dict[Any, Any], sets).items() if each is not None}

    @model_validator(mode="after")
    def _something_is_measured(self) -> EvalConfig:
        if "mean" in self.sets:
            raise ValueError("sets.mean: that is the name of the mean over all sets")
        if not self.num_samples and not self.greedy:
            raise ValueError("num_samples=0 and greedy=false: nothing is generated")
        if self.num_samples and (not self.pass_at or max(self.pass_at) > self.num_samples):
            raise ValueError(
                f"pass_at={list(self.pass_at)} needs one k at least, none above "
                f"num_samples={self.num_samples}"
            )
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
    """While the loop waits for verdicts: the end of any attempt is a sign of life."""
    wait_s: Positive = 14400
    """For other rollout engines and their rewards, which have deadlines of their own."""
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

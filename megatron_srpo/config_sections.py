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


class AlgorithmConfig(Section):
    resets: str = "self"
    """none (GRPO); random (RRPO); self (SRPO): the thought that the policy blames; oracle: the
    first wrong one, where the task knows it; or your own rule, FILE.py:CLASS. Controls:
    depth_matched: as deep as `self` went for another seed; prompt: to the prompt; dial: oracle
    with probability `dial`, else random."""
    dial: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How often the localizer of `resets=dial` is right."""
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
    allocation: Literal["fixed", "dead"] = "fixed"
    """Which prompts have resets. fixed: those with failed rollouts; dead: those whose base rollouts
    have all failed. The others' suffixes are fresh rollouts."""
    reset_rounds: Count = 1
    """A seed's suffixes come in so many rounds. While none from a state is correct, the next round
    leaves from the furthest state to which the rule resets one of them."""
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

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> AlgorithmConfig:
        if self.dial != 1 and self.resets != "dial":
            raise ValueError(f"dial={self.dial:g} is of resets=dial, not of resets={self.resets}")
        if self.allocation == "dead" and self.seeds == "extra_draws":
            raise ValueError("allocation=dead looks at the base group: it needs seeds=in_group")
        if self.num_suffixes % self.reset_rounds:
            raise ValueError(
                f"split={self.split} does not divide its {self.num_suffixes} suffixes over "
                f"reset_rounds={self.reset_rounds}"
            )
        return self


class CreditConfig(Section):
    rule: str = "group"
    """group: (reward - baseline) / std within a group, on the tokens that a rollout sampled
    itself; pooled: the same with all rollouts of a prompt for one group; chain: pooled, and copied
    prefixes are credited with `prefix_weight` x reward / std; or your own rule, FILE.py:CLASS."""
    prefix_weight: NonNegative = 1.0
    """Of `rule=chain`; 0: prefixes are masked, and count among the tokens."""
    baseline: Literal["mean", "half", "leave_one_out"] = "mean"
    """half: half of the mean (a control); leave_one_out: the mean of the group's other rewards."""
    std: Literal["population", "sample", "none"] = "population"
    """What the difference is divided by."""
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """sequence_mean: over sequences, of the means over their tokens. token_mean: over tokens."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> CreditConfig:
        if self.prefix_weight != 1 and self.rule != "chain":
            raise ValueError(
                f"prefix_weight={self.prefix_weight:g} is of rule=chain, not of rule={self.rule}"
            )
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

    @model_validator(mode="after")
    def _template_formats(self) -> LocalizeConfig:
        check_template("template", self.template, ("prompt", "response", "steps"))
        return self


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

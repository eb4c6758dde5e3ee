"""Every knob on one page:   YAML file + dotted overrides -> typed, validated, frozen `Config`

A key that does not exist is an error that names the nearest right one. Lengths are in tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_srpo.types import InputError

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
    method: Literal["grpo", "rrpo", "srpo", "oracle"] = "srpo"
    """grpo: no resets. rrpo: to a random thought. srpo: to the thought that the policy blames.
    oracle: to the first wrong thought, where the task knows it."""
    num_prompts: Count = 16
    """Per step, over all replicas."""
    num_rollouts: Count = 8
    """N: trained rollouts per prompt, base and suffix together."""
    split: Annotated[str, Field(pattern=r"^1x[1-9][0-9]*$")] = "1x4"
    """SEEDSxSUFFIXES: of the N rollouts, so many restart from a failed one; the rest are fresh."""

    @property
    def num_suffixes(self) -> int:
        """Rollouts per prompt that restart from a reset state."""
        return 0 if self.method == "grpo" else int(self.split.split("x")[1])

    @property
    def num_base(self) -> int:
        """Fresh rollouts per prompt."""
        return self.num_rollouts - self.num_suffixes

    @model_validator(mode="after")
    def _split_fits(self) -> AlgorithmConfig:
        if self.num_base < 1:
            raise ValueError(
                f"num_rollouts={self.num_rollouts} does not fit split={self.split}: "
                f"{self.num_suffixes} suffixes need at least {self.num_suffixes + 1} rollouts, "
                "since the seed is one of the fresh ones"
            )
        return self


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


class RolloutConfig(Section):
    max_response_tokens: Count = 1024
    temperature: Positive = 1.0
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
    """Everything that a run leaves; must not hold another run."""
    model: Path
    """Hugging Face folder of the policy to train."""
    seed: int = 0
    num_steps: Count = 100
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations in the trainer and in the rollout engine."""
    max_logprob_diff: Positive = 1e-5
    """The run stops where trainer and rollout engine differ by more nats on any token."""
    micro_batch_tokens: Count = 16384
    """A forward pass holds at most so many tokens (or one sequence, if that is longer)."""
    reward: Literal["last_line", "boxed"] = "boxed"
    """Where the response's answer stands, to be compared with `answer` as text."""
    data: DataConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    thoughts: ThoughtConfig = ThoughtConfig()
    localize: LocalizeConfig = LocalizeConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    retention: RetentionConfig = RetentionConfig()
    eval: EvalConfig = EvalConfig()
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
        if self.algorithm.method == "srpo" and longest + self.localize.max_tokens > (
            self.rollout.max_model_len
        ):
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
    def _template_formats(self) -> Config:
        try:
            self.localize.template.format(prompt="", response="", steps="")
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"localize.template: {error!r} is none of {{prompt}} {{response}} {{steps}} "
                "(a literal brace is written twice)"
            ) from error
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """YAML file, then `section.key=value` overrides.

    Raises `InputError` with one line for everything that is wrong with them.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    for override in overrides:
        if "=" not in override:
            raise InputError(f"override {override!r}: must look like section.key=value")
    try:
        tree = OmegaConf.load(path)
        if not isinstance(tree, DictConfig):
            raise InputError(f"{path}: must be a mapping of keys to values")
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:  # one without a number is OmegaConf's, about a lone number
        reason = error.strerror or "must be a mapping of keys to values"
        raise InputError(f"{path}: {reason}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    _refuse_unknown_keys(values, path)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        given = "" if isinstance(first["input"], Mapping | Section) else f"={first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}{given}: {message}") from error


def dump_config(cfg: Config) -> str:
    """The resolved config as YAML, every default written out."""
    text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text.replace("${", "\\${")  # loaded again, it is a text and no interpolation


def field_names(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if inner := _section_of(field.annotation):
            yield from field_names(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _refuse_unknown_keys(values: dict[Any, Any], path: Path, prefix: str = "") -> None:
    known = list(field_names())
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name not in known:
            # A right last part in the wrong section is the commonest slip.
            near = [k for k in known if k.split(".")[-1] == str(key)]
            near += difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{path}: unknown key {name!r}{hint}")
        if isinstance(value, dict):
            _refuse_unknown_keys(cast(dict[Any, Any], value), path, f"{name}.")

"""What the user's files hold, read and checked before an engine is imported or anything written.

Every function raises `InputError` for the first thing that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srpo.config import Config, ParallelConfig
from megatron_srpo.data import PromptSet, read_demonstrations, read_prompts
from megatron_srpo.hf_folder import (
    head_size,
    num_kv_heads,
    read_config,
    tensor_shapes,
    weight_files,
)
from megatron_srpo.journal import check_replay
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.seeding import counter_seed
from megatron_srpo.tokenizer import HFTokenizer
from megatron_srpo.types import InputError, Prompt, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """For training."""

    tokenizer: HFTokenizer
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    dropped: Sequence[str]
    """Ids of prompts, held-out ones included, that are too long and were left out."""
    retained: Sequence[tuple[Tokens, Tokens]]
    """Demonstrations of the retention loss; empty without one."""
    shapes: dict[str, tuple[int, ...]]
    """Hugging Face name -> shape of every tensor of the policy."""


def read_inputs(cfg: Config, *, num_replicas: int, replay: Path | None = None) -> Inputs:
    """Everything that `train` needs of the user's files."""
    RunFolder(cfg.run_dir).check_free()
    if cfg.algorithm.num_prompts % num_replicas:
        raise InputError(
            f"algorithm.num_prompts={cfg.algorithm.num_prompts} does not divide over "
            f"{num_replicas} processes"
        )
    tokenizer = HFTokenizer(cfg.model)
    _check_engine_fits(cfg)
    limits = {
        "max_prompt_tokens": cfg.data.max_prompt_tokens,
        "long_prompts": cfg.data.long_prompts,
    }
    prompts, dropped = read_prompts(cfg.data.train, tokenizer, **limits)
    held_out, also_dropped = read_prompts(cfg.data.eval, tokenizer, **limits)
    if len(prompts) < cfg.algorithm.num_prompts:
        raise InputError(
            f"{cfg.data.train}: {len(prompts)} prompts are fewer than a step's "
            f"algorithm.num_prompts={cfg.algorithm.num_prompts}"
        )
    if cfg.algorithm.method == "oracle" and not all(prompt.solution for prompt in prompts):
        raise InputError(f"{cfg.data.train}: algorithm.method=oracle needs `solution` in each row")
    if replay is not None:
        _check_replay(cfg, prompts, replay)
    return Inputs(
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=held_out[: cfg.eval.num_prompts],
        dropped=[*dropped, *also_dropped],
        retained=read_demonstrations(cfg.retention.data, tokenizer) if cfg.retention.data else [],
        shapes=tensor_shapes(cfg.model),
    )


def read_sft_inputs(cfg: Config, *, num_replicas: int) -> list[tuple[Tokens, Tokens]]:
    """The demonstrations of a warm start."""
    if cfg.sft is None:
        raise InputError("the config has no `sft` section")
    RunFolder(cfg.sft.run_dir).check_free()
    if cfg.sft.batch_size % num_replicas:
        raise InputError(
            f"sft.batch_size={cfg.sft.batch_size} does not divide over {num_replicas} processes"
        )
    weight_files(cfg.sft.model)
    return read_demonstrations(cfg.sft.data, HFTokenizer(cfg.sft.model))


def prompt_set(
    cfg: Config, prompts: Sequence[Prompt], *, replica: int, num_replicas: int
) -> PromptSet:
    """The order in which the run draws its prompts, for one replica."""
    seed = counter_seed(cfg.seed, "data")
    return PromptSet(prompts, seed=seed, replica=replica, num_replicas=num_replicas)


def check_layout(
    parallel: ParallelConfig, model: Mapping[str, Any], *, num_processes: int, rollout_tp: int = 1
) -> None:
    """The processes divide over the layout, and the model (its config.json) over the processes."""
    heads = {
        "the model's num_attention_heads": model["num_attention_heads"],
        "the model's num_key_value_heads": num_kv_heads(model),
        "the model's intermediate_size": model["intermediate_size"],
    }
    layers = {"the model's num_hidden_layers": model["num_hidden_layers"]}
    vocabulary = {"the model's vocab_size": model["vocab_size"]}
    processes = {"the number of processes": num_processes}
    for numbers, knob, divisor in (
        (processes, "parallel.tp x parallel.pp", parallel.tp * parallel.pp),
        (processes, "rollout.tp", rollout_tp),
        (heads | vocabulary, "parallel.tp", parallel.tp),
        (layers, "parallel.pp", parallel.pp),
        (heads, "rollout.tp", rollout_tp),
    ):
        for name, number in numbers.items():
            if number % divisor:
                raise InputError(f"{name}, {number}, does not divide by {knob} = {divisor}")


def _check_engine_fits(cfg: Config) -> None:
    """The rollout engine must hold the longest sequence."""
    model = read_config(cfg.model)
    longest = cfg.rollout.max_model_len
    if longest > model["max_position_embeddings"]:
        raise InputError(
            f"rollout.max_model_len={longest} is more than the model's "
            f"max_position_embeddings={model['max_position_embeddings']}"
        )
    num_values = 2 * model["num_hidden_layers"] * num_kv_heads(model) * head_size(model)
    num_bytes = num_values * {"float32": 4, "bfloat16": 2}[cfg.dtype]
    if cfg.rollout.kv_cache_bytes < num_bytes * longest:
        raise InputError(
            f"rollout.kv_cache_bytes={cfg.rollout.kv_cache_bytes} does not hold one sequence of "
            f"rollout.max_model_len={longest} tokens: that takes {num_bytes * longest}"
        )


def _check_replay(cfg: Config, prompts: Sequence[Prompt], replay: Path) -> None:
    """The journal has every step's rollouts of the very prompts that this run will draw."""
    order = prompt_set(cfg, prompts, replica=0, num_replicas=1)
    for step in range(cfg.num_steps):
        ids = [prompt.id for prompt in order.next(cfg.algorithm.num_prompts)]
        check_replay(RunFolder(replay).rollouts, ids, step=step)

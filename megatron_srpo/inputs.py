"""What the user's files hold, read and checked before an engine is imported or anything written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_srpo.config import Config
from megatron_srpo.data import read_demonstrations, read_prompts
from megatron_srpo.hf_folder import tensor_shapes
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.tokenizer import HFTokenizer
from megatron_srpo.types import InputError, Prompt, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the user's files hold."""

    tokenizer: HFTokenizer
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    dropped: Sequence[str]
    """Ids of training prompts that are too long and were left out."""
    retained: Sequence[tuple[Tokens, Tokens]]
    """Demonstrations of the retention loss; empty without one."""
    shapes: dict[str, tuple[int, ...]]
    """Hugging Face name -> shape of every tensor of the policy."""


def read_inputs(cfg: Config, *, num_replicas: int) -> Inputs:
    """Raises `InputError` for the first thing that is wrong with the user's files."""
    RunFolder(cfg.run_dir).check_free()
    if cfg.algorithm.num_prompts % num_replicas:
        raise InputError(
            f"algorithm.num_prompts={cfg.algorithm.num_prompts} does not divide over "
            f"{num_replicas} processes"
        )
    tokenizer = HFTokenizer(cfg.model)
    limits = {
        "max_prompt_tokens": cfg.data.max_prompt_tokens,
        "long_prompts": cfg.data.long_prompts,
    }
    prompts, dropped = read_prompts(cfg.data.train, tokenizer, **limits)
    held_out, _ = read_prompts(cfg.data.eval, tokenizer, **limits)
    if len(prompts) < cfg.algorithm.num_prompts:
        raise InputError(
            f"{cfg.data.train}: {len(prompts)} prompts are fewer than a step's "
            f"algorithm.num_prompts={cfg.algorithm.num_prompts}"
        )
    if cfg.algorithm.method == "oracle" and not all(prompt.solution for prompt in prompts):
        raise InputError(f"{cfg.data.train}: algorithm.method=oracle needs `solution` in each row")
    return Inputs(
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=held_out[: cfg.eval.num_prompts],
        dropped=dropped,
        retained=read_demonstrations(cfg.retention.data, tokenizer) if cfg.retention.data else [],
        shapes=tensor_shapes(cfg.model),
    )

"""What the user's files hold, read and checked before an engine is imported or anything written.

Every function raises `InputError` for the first thing that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srpo.advantages import CREDITS
from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.data import PromptFormat, PromptSet, read_demonstrations, read_prompts
from megatron_srpo.engines.megatron.backend import (
    Machine,
    backend_of,
    check_model,
    check_rollouts,
    choose,
    this_machine,
)
from megatron_srpo.engines.megatron.families import FAMILIES, family_of
from megatron_srpo.engines.megatron.names import padded_size
from megatron_srpo.evaluate import HeldOut
from megatron_srpo.extensions import build
from megatron_srpo.held_out import check_answers, check_disjoint, judge_of, read_held_out
from megatron_srpo.hf_config import completed_config, head_size, num_experts, num_kv_heads
from megatron_srpo.hf_folder import tensor_shapes, weight_files
from megatron_srpo.journal import check_replay
from megatron_srpo.protocols import CreditRule, ResetRule
from megatron_srpo.resets import RULES
from megatron_srpo.resume import Progress, progress_of
from megatron_srpo.rewards.judge import RewardJudge
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.seeding import counter_seed
from megatron_srpo.staging import check_free
from megatron_srpo.tokenizer import HFTokenizer
from megatron_srpo.types import InputError, Prompt, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalInputs:
    """For evaluation alone."""

    tokenizer: HFTokenizer
    sets: Sequence[HeldOut]
    dropped: Sequence[str]
    """Ids of prompts that are too long and were left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """For training."""

    tokenizer: HFTokenizer
    judge: RewardJudge
    rule: ResetRule
    credit: CreditRule
    prompts: Sequence[Prompt]
    sets: Sequence[HeldOut]
    """Held-out problems."""
    dropped: Sequence[str]
    """Ids of prompts, held-out ones included, that are too long and were left out."""
    retained: Sequence[tuple[Tokens, Tokens]]
    """Demonstrations of the retention loss; empty without one."""
    shapes: dict[str, tuple[int, ...]]
    """Hugging Face name -> shape of every tensor of the policy."""
    progress: Progress
    """Of the run in the run folder, if there is one."""


def read_inputs(
    cfg: Config, *, num_processes: int, replay: Path | None = None, machine: Machine | None = None
) -> Inputs:
    """Everything that `train` needs of the user's files. `machine`: where it will; None: here."""
    RunFolder(cfg.run_dir).check_idle()
    progress = progress_of(cfg, replay)
    family_of(cfg.model)  # only for what it refuses
    model = completed_config(cfg.model)
    layout = {"num_processes": num_processes, "rollout_tp": cfg.rollout.tp}
    check_layout(cfg.parallel, model, **layout)
    check_model(choose(cfg, machine or this_machine()), model, cfg.parallel)
    check_prompts_divide(cfg, num_processes // cfg.rollout.tp)
    tokenizer = HFTokenizer(cfg.model)
    check_engine_fits(cfg, model)
    judge = judge_of(cfg, cfg.reward, cfg.second_reward)
    prompts, dropped = read_prompts(
        cfg.data.train,
        tokenizer,
        format=PromptFormat.of(cfg),
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        long_prompts=cfg.data.long_prompts,
    )
    check_answers(prompts, (cfg.reward, cfg.second_reward), cfg.data.train)
    sets, also_dropped = read_held_out(cfg, tokenizer, judge)
    check_disjoint(prompts, sets, cfg)
    if len(prompts) < cfg.algorithm.num_prompts:
        raise InputError(
            f"{cfg.data.train}: {len(prompts)} prompts are fewer than a step's "
            f"algorithm.num_prompts={cfg.algorithm.num_prompts}"
        )
    resets = cfg.algorithm.resets
    if resets in ("oracle", "dial") and not all(prompt.solution for prompt in prompts):
        raise InputError(
            f"{cfg.data.train}: algorithm.resets={resets} needs `solution` in each row"
        )
    if replay is not None:
        _check_replay(cfg, prompts, replay)
    _check_rollouts(cfg, prompts, RunFolder(cfg.run_dir), progress.journalled)
    return Inputs(
        tokenizer=tokenizer,
        judge=judge,
        rule=build(cfg.algorithm.resets, RULES, ResetRule, cfg, tokenizer, key="algorithm.resets"),
        credit=build(cfg.credit.rule, CREDITS, CreditRule, cfg, key="credit.rule"),
        prompts=prompts,
        sets=sets,
        dropped=[*dropped, *also_dropped],
        retained=read_demonstrations(cfg.retention.data, tokenizer) if cfg.retention.data else [],
        shapes=tensor_shapes(cfg.model),
        progress=progress,
    )


def read_eval_inputs(
    cfg: Config,
    *,
    num_processes: int,
    out: Path | None = None,
    is_stored: bool = True,
    machine: Machine | None = None,
) -> EvalInputs:
    """Everything that `eval` needs of the user's files; `out` must be a folder that can be made.
    Without `is_stored` the model's folder lacks its weights, which are in a checkpoint. `machine`:
    where it will; None: here."""
    if out is not None:
        check_free(out)
    model = completed_config(cfg.model)
    layout = {"num_processes": num_processes, "rollout_tp": cfg.rollout.tp}
    check_layout(ParallelConfig(), model, **layout)
    check_rollouts(cfg.fp8, machine or this_machine())
    tokenizer = HFTokenizer(cfg.model)
    check_engine_fits(cfg, model)
    if is_stored:
        tensor_shapes(cfg.model)  # only for what it refuses
    judge = judge_of(cfg, cfg.reward, cfg.second_reward)
    sets, dropped = read_held_out(cfg, tokenizer, judge)
    return EvalInputs(tokenizer=tokenizer, sets=sets, dropped=dropped)


def read_sft_inputs(cfg: Config, *, num_processes: int) -> list[tuple[Tokens, Tokens]]:
    """The demonstrations of a warm start."""
    if cfg.sft is None:
        raise InputError("the config has no `sft` section")
    RunFolder(cfg.sft.run_dir).check_free()
    family_of(cfg.sft.model)  # only for what it refuses
    check_layout(cfg.parallel, completed_config(cfg.sft.model), num_processes=num_processes)
    check_model(backend_of(cfg), completed_config(cfg.sft.model), cfg.parallel)
    if cfg.sft.batch_size % num_processes:
        raise InputError(
            f"sft.batch_size={cfg.sft.batch_size} does not divide over {num_processes} processes"
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
    """The processes divide over the layout, and the model (its completed config) over them."""
    tp, pp, cp, ep = parallel.tp, parallel.pp, parallel.cp, parallel.ep
    widths = {
        "the model's num_attention_heads": model["num_attention_heads"],
        "the model's intermediate_size": model["intermediate_size"],
    }
    padded = {"the model's padded vocabulary": padded_size(model["vocab_size"])}
    expert_width = {"the model's moe_intermediate_size": model.get("moe_intermediate_size") or 0}
    layers = {"the model's num_hidden_layers": model["num_hidden_layers"]}
    processes = {"the number of processes": num_processes}
    experts = {"the model's number of experts": num_experts(model)}
    for numbers, knob, divisor in (
        (processes, "parallel.tp x parallel.pp x parallel.cp", tp * pp * cp),
        (processes, "parallel.pp x parallel.ep", pp * ep),
        (processes, "rollout.tp", rollout_tp),
        (widths | padded, "parallel.tp", tp),
        (expert_width, "parallel.tp", tp if ep == 1 else 1),
        (expert_width, "rollout.tp", rollout_tp),
        (layers, "parallel.pp x parallel.vpp", pp * parallel.vpp),
        (widths, "rollout.tp", rollout_tp),
        (experts, "parallel.ep", ep),
    ):
        for name, number in numbers.items():
            if number % divisor:
                raise InputError(f"{name}, {number}, does not divide by {knob} = {divisor}")
    _check_groups(model, "parallel.tp", tp)
    _check_groups(model, "rollout.tp", rollout_tp)
    if ep > 1 and not num_experts(model):
        raise InputError(f"parallel.ep={ep}: the model has no experts to share")
    if parallel.vpp > 1 and pp == 1:
        raise InputError(f"parallel.vpp={parallel.vpp} needs a pipeline: parallel.pp is 1")


def _check_groups(model: Mapping[str, Any], knob: str, size: int) -> None:
    """A process holds some key-value heads, or several processes hold one; a norm over all heads
    would count that one several times."""
    num_groups = num_kv_heads(model)
    family = FAMILIES.get(model["model_type"])
    all_heads = knob == "parallel.tp" and family is not None and family.qk_norm == "full"
    if num_groups % size and (size % num_groups or all_heads):
        raise InputError(
            f"the model's num_key_value_heads, {num_groups}, does not divide by {knob} = {size}"
        )


def check_prompts_divide(cfg: Config, num_replicas: int) -> None:
    """So that which prompts share an update does not depend on the number of replicas."""
    num_updates = cfg.loss.updates_per_batch
    if cfg.algorithm.num_prompts % (num_replicas * num_updates):
        raise InputError(
            f"algorithm.num_prompts={cfg.algorithm.num_prompts} does not divide over "
            f"{num_replicas} rollout engines x loss.updates_per_batch={num_updates}"
        )


def check_engine_fits(cfg: Config, model: Mapping[str, Any]) -> None:
    """The rollout engine must hold the longest sequence of the model (its completed config)."""
    longest = cfg.rollout.max_model_len
    if longest > model["max_position_embeddings"]:
        raise InputError(
            f"rollout.max_model_len={longest} is more than the model's "
            f"max_position_embeddings={model['max_position_embeddings']}"
        )
    # Each process of an engine holds its own heads' keys and values.
    num_heads = max(1, num_kv_heads(model) // cfg.rollout.tp)
    num_values = 2 * model["num_hidden_layers"] * num_heads * head_size(model)
    num_bytes = num_values * {"float32": 4, "bfloat16": 2}[cfg.dtype]
    if cfg.rollout.kv_cache_bytes < num_bytes * longest:
        raise InputError(
            f"rollout.kv_cache_bytes={cfg.rollout.kv_cache_bytes} does not hold one sequence of "
            f"rollout.max_model_len={longest} tokens: that takes {num_bytes * longest}"
        )


def _check_replay(cfg: Config, prompts: Sequence[Prompt], replay: Path) -> None:
    """The journal has every step's rollouts of the very prompts that this run will draw.

    Importance weights compare log-probs: there the rollouts must have been sampled as this run
    would sample them.
    """
    if cfg.loss.importance != "none":
        sampled = load_config(replay / "config.yaml").rollout
        if (sampled.temperature, sampled.top_p) != (cfg.rollout.temperature, cfg.rollout.top_p):
            raise InputError(
                f"{replay}: was sampled at temperature {sampled.temperature:g} and top_p "
                f"{sampled.top_p:g}: loss.importance={cfg.loss.importance} means nothing there "
                f"for a policy at {cfg.rollout.temperature:g} and {cfg.rollout.top_p:g}"
            )
    _check_rollouts(cfg, prompts, RunFolder(replay), range(cfg.num_steps))


def _check_rollouts(
    cfg: Config, prompts: Sequence[Prompt], folder: RunFolder, steps: range
) -> None:
    """Of every prompt that these steps draw."""
    order = prompt_set(cfg, prompts, replica=0, num_replicas=1)
    for step in range(steps.stop):
        ids = [prompt.id for prompt in order.next(cfg.algorithm.num_prompts)]
        if step in steps:
            check_replay(folder.rollouts, ids, step=step)

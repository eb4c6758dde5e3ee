"""What does each field of the config change?  A choice that changes nothing would be a lie.

Real engines and a random policy. One journal of rollouts under the default config is fixed; a
field's other value then changes the rollouts (drawn anew), the samples that the journal's groups
become, or the weights after a step on the journal. `pytest -s` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_srpo.advantages import CREDITS
from megatron_srpo.algorithm import collect_groups, to_samples
from megatron_srpo.assembly import auxiliary_samples, build_learner, held_out_sums
from megatron_srpo.batching import mini_batches
from megatron_srpo.config import Config
from megatron_srpo.config_file import field_names, load_config
from megatron_srpo.config_sections import DeadlineConfig
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.exchange import exchange
from megatron_srpo.inputs import Inputs, prompt_set, read_inputs
from megatron_srpo.journal import Journal, read_step
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.rollouts import Roles
from megatron_srpo.stopping import StopPoints
from megatron_srpo.types import Group, Prompt, Sample, Score
from tests.e2e.small_run import write_small_run
from tests.unit.builders import in_place

PPO = ("loss.surrogate=ppo", "loss.updates_per_batch=2", "optimizer.lr=3e-3")
CHOICES: dict[str, tuple[str, ...]] = {
    # field: its other value, then what both sides of the comparison have besides
    "seed": ("seed=1",),
    "num_steps": ("num_steps=3", "optimizer.decay=linear"),
    "dtype": ("dtype=bfloat16",),
    "data.train": ("data.train={folder}/others.jsonl",),
    "data.template": ("data.template=Sum {prompt}", "data.max_prompt_tokens=20"),
    "data.answer_format": (
        "data.answer_format='1+'",
        "data.template='{prompt}{answer_format}'",
        "data.max_prompt_tokens=20",
    ),
    "algorithm.resets": ("algorithm.resets=random",),
    "algorithm.num_prompts": ("algorithm.num_prompts=2",),
    "algorithm.num_rollouts": ("algorithm.num_rollouts=9",),
    "algorithm.split": ("algorithm.split=2x2",),
    "algorithm.seeds": ("algorithm.seeds=extra_draws",),
    "algorithm.max_draws": (
        "algorithm.max_draws=8",
        "algorithm.seeds=extra_draws",
        "algorithm.split=4x1",
    ),
    "algorithm.dial": ("algorithm.dial=0", "algorithm.resets=dial"),
    "algorithm.allocation": ("algorithm.allocation=dead",),
    "algorithm.reset_rounds": (
        "algorithm.reset_rounds=2",
        "algorithm.resets=random",
        "algorithm.num_rollouts=12",
        "algorithm.split=3x2",
    ),
    "algorithm.reset_offset": ("algorithm.reset_offset=1", "algorithm.resets=random"),
    "algorithm.empty_prefix": ("algorithm.empty_prefix=separate",),
    "algorithm.truncated": ("algorithm.truncated=mask",),
    "algorithm.max_redraws": (
        "algorithm.max_redraws=2",
        "algorithm.num_rollouts=2",
        "algorithm.split=1x1",
    ),
    "thoughts.delimiter": ("thoughts.delimiter=+", "algorithm.resets=random"),
    "thoughts.max_tokens": ("thoughts.max_tokens=3", "algorithm.resets=random"),
    "localize.template": ("localize.template='{response}'",),
    "localize.parser": (
        "localize.parser=boxed",
        "localize.max_tokens=60",
        "localize.temperature=2",
        "thoughts.delimiter=ab",
        "thoughts.max_tokens=24",
    ),
    "localize.temperature": ("localize.temperature=2",),
    "localize.max_tokens": ("localize.max_tokens=3",),
    "localize.fallback": ("localize.fallback=random",),
    "rollout.max_response_tokens": ("rollout.max_response_tokens=12",),
    "rollout.temperature": ("rollout.temperature=0.5",),
    "rollout.top_p": ("rollout.top_p=0.5",),
    "rollout.max_model_len": (
        "rollout.max_model_len=52",
        "localize.template='{response}{response}{response}'",
    ),
    "credit.rule": ("credit.rule=chain",),
    "credit.prefix_weight": ("credit.prefix_weight=0.5", "credit.rule=chain"),
    "credit.baseline": ("credit.baseline=leave_one_out",),
    "credit.std": ("credit.std=sample",),
    "credit.aggregation": ("credit.aggregation=token_mean",),
    "loss.surrogate": ("loss.surrogate=ppo", *PPO[1:]),
    "loss.clip_low": ("loss.clip_low=0.001", *PPO),
    "loss.clip_high": ("loss.clip_high=0.001", *PPO),
    "loss.kl_coef": ("loss.kl_coef=0.1", *PPO[1:]),
    "loss.importance": ("loss.importance=token_truncate", "loss.importance_cap=0.99999"),
    "loss.importance_cap": ("loss.importance_cap=0.5", "loss.importance=sequence_truncate"),
    "loss.updates_per_batch": ("loss.updates_per_batch=2",),
    "optimizer.lr": ("optimizer.lr=1e-4",),
    "optimizer.min_lr": ("optimizer.min_lr=1e-4", "optimizer.decay=linear"),
    "optimizer.decay": ("optimizer.decay=linear",),
    "optimizer.warmup_steps": ("optimizer.warmup_steps=2",),
    "optimizer.beta1": ("optimizer.beta1=0.5",),
    "optimizer.beta2": ("optimizer.beta2=0.5",),
    "optimizer.eps": ("optimizer.eps=1e-3",),
    "optimizer.weight_decay": ("optimizer.weight_decay=0.1",),
    "optimizer.clip_grad": ("optimizer.clip_grad=0.001",),
    "retention.source": ("retention.source=initial",),
    "retention.data": ("retention.data={folder}/demonstrations.jsonl",),
    "retention.num_samples": (
        "retention.num_samples=3",
        "retention.data={folder}/demonstrations.jsonl",
    ),
    "retention.weight": ("retention.weight=1", "retention.data={folder}/demonstrations.jsonl"),
    "eval.num_prompts": ("eval.num_prompts=4",),
    "eval.greedy": ("eval.greedy=true",),
    "eval.num_seeds": ("eval.num_seeds=2",),
    "eval.temperature": ("eval.temperature=0.5",),
    "eval.num_samples": ("eval.num_samples=3",),
    "eval.pass_at": ("eval.pass_at=[1,2]", "eval.num_samples=3"),
}
ELSEWHERE = {
    # where things lie, how long a run is, what is written beside it: test_command_line.py
    "run_dir", "model", "eval.every", "log.wandb", "log.wandb_project", "log.tensorboard",
    "sft.run_dir", "sft.model", "sft.data", "sft.num_steps", "sft.batch_size",
    # which data are read, and how: tests/unit/test_data.py, test_held_out.py
    "data.max_prompt_tokens", "data.long_prompts", "data.chat", "eval.sets.*.data",
    "eval.sets.*.reward", "eval.sets.*.second_reward", "eval.sets.*.answer_format",
    # when the state is saved, and how: tests/parallel/test_resume.py, tests/unit/test_checkpoint_*
    "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every",
    "checkpoint.asynchronous",
    # what the engine may use, which must not change its answers
    "rollout.kv_cache_bytes", "rollout.max_num_seqs",
    # who draws with which numbers: test_generator.py
    "rollout.seeding",
    # whose memory is where: tests/unit/test_colocation.py, tests/parallel/test_parking.py
    "colocation.park", "optimizer.offload_fraction",
    # how the work is divided, which must not change the result: tests/parallel
    "parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "parallel.ep",
    "parallel.recompute", "parallel.overlap", "rollout.tp", "micro_batch_tokens",
    # how the head is computed, likewise: tests/parallel/test_layouts.py
    "kernels.head",
    # whose layers compute, and what needs a GPU: tests/unit/test_backend.py, test_engine_layers.py
    "backend", "fp8.recipe", "fp8.first_last_bf16", "fp8.param_gather", "fp8.rollout",
    # alarms: tests/unit/test_mismatch.py
    "mismatch.max_mean", "mismatch.max_kl", "mismatch.patience",
    # when a run that shows no sign of life ends: tests/unit/test_watchdog.py
    *(f"deadlines.{name}" for name in DeadlineConfig.model_fields),
    # when a reward is given up, which changes none that answers, how many are asked at once, and
    # a metric: tests/unit/test_process.py, test_workers.py
    "reward_timeout_s", "reward_workers", "second_reward", "sandbox",
    # an alarm: test_faults.py; parts of the user's: test_extensions.py; tests/unit/test_localize.py
    "max_logprob_diff", "reward", "localize.chat",
}  # fmt: skip
ROLLOUTS = ("seed", "data", "algorithm", "thoughts", "localize", "rollout")
UPDATE = ("num_steps", "dtype", "loss", "optimizer", "retention")


def graded(prompt: Prompt, response: str) -> Score:
    """Three values, without end: a random policy gets a signal in most groups."""
    value = sum(map(ord, response)) % 3 / 2
    return Score(value=value, correct=value >= 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What all comparisons share."""

    folder: Path
    mesh: Mesh
    engine: VllmGenerator
    journal: Sequence[Group]
    """Rollouts under the default config, written and read."""
    continued: Sequence[Group]
    """Rollouts with copied prefixes: a random policy names no thought that leaves one."""

    def config(self, *overrides: str) -> Config:
        filled = [override.replace("{folder}", str(self.folder)) for override in overrides]
        return load_config(self.folder / "config.yaml", ["optimizer.lr=1e-3", *filled])

    def roles(self, cfg: Config, inputs: Inputs) -> Roles:
        return Roles(
            generator=self.engine,
            tokenizer=inputs.tokenizer,
            judge=in_place(graded),
            rule=inputs.rule,
        )

    def rollouts(self, cfg: Config) -> list[Group]:
        inputs = read_inputs(cfg, num_processes=1)
        source = prompt_set(cfg, inputs.prompts, replica=0, num_replicas=1)
        prompts = source.next(cfg.algorithm.num_prompts)
        return collect_groups(prompts, step=0, roles=self.roles(cfg, inputs), cfg=cfg)

    def samples(self, cfg: Config) -> list[Sample]:
        return to_samples(self.continued, CREDITS[cfg.credit.rule](cfg), cfg)

    def weights(self, cfg: Config) -> dict[str, torch.Tensor]:
        """After two steps on the default samples of the journal."""
        learner = build_learner(cfg, self.mesh, StopPoints())
        inputs = read_inputs(cfg, num_processes=1)
        auxiliary = auxiliary_samples(cfg, inputs, self.mesh)
        for step in range(2):
            samples = self.samples(self.config()) + auxiliary(step, self.journal)
            learner.update(
                [
                    exchange(
                        part,
                        self.mesh,
                        layout=PackLayout.on(self.mesh, max_tokens=1000),
                        with_silent=cfg.loss.kl_coef > 0,
                    )
                    for part in mini_batches(samples, cfg.loss.updates_per_batch)
                ]
            )
        return {name: tensor.float().clone() for name, tensor in learner.export()}

    def evaluation(self, cfg: Config) -> dict[str, tuple[float, float]]:
        inputs = read_inputs(cfg, num_processes=1)
        shares = [(held_out, in_place(graded)) for held_out in inputs.sets]
        return held_out_sums(shares, self.roles(cfg, inputs), cfg)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, mesh: Mesh, engines: list[object]
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("choices")
    cfg = load_config(write_small_run(folder))
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "others.jsonl").write_text("\n".join(reversed(rows)))
    engine = VllmGenerator(cfg.model, cfg.rollout, dtype=cfg.dtype)
    engines.append(engine)
    blank = World(folder=folder, mesh=mesh, engine=engine, journal=(), continued=())
    journal = Journal(folder=folder / "rollouts", replica=0, num_replicas=1)
    journal.write(0, blank.rollouts(blank.config()))
    yield replace(
        blank,
        journal=read_step(journal.folder, 0),
        continued=blank.rollouts(blank.config("algorithm.resets=random")),
    )


def changed_rollouts(one: Sequence[Group], other: Sequence[Group]) -> int:
    """Rollouts that only one side has, or that are not in a group alike on both."""

    def described(groups: Sequence[Group]) -> set[tuple[Any, ...]]:
        return {
            (r.id, r.token_ids.tobytes(), len(r.thoughts), g.use, g.resets, len(g.rollouts))
            for g in groups
            for r in g.rollouts
        }

    return len(described(one) ^ described(other))


def changed_samples(one: Sequence[Sample], other: Sequence[Sample]) -> int:
    return sum(
        not np.array_equal(a.loss_weight * a.advantage, b.loss_weight * b.advantage)
        or a.count != b.count
        for a, b in zip(one, other, strict=True)
    )


def changed_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def difference(world: World, field: str, cfg: Config, other: Config) -> tuple[str, float]:
    """(what is counted, how much of it differs)"""
    section = field.partition(".")[0]
    if section == "credit" or field == "algorithm.truncated":
        return "samples", changed_samples(world.samples(cfg), world.samples(other))
    if section in ROLLOUTS:
        return "rollouts", changed_rollouts(world.rollouts(cfg), world.rollouts(other))
    if section in UPDATE:
        largest = changed_weights(world.weights(cfg), world.weights(other))
        return "largest change of a weight", largest
    one, two = world.evaluation(cfg), world.evaluation(other)
    return "eval metrics", sum(one.get(name) != two.get(name) for name in one | two)


@pytest.mark.parametrize("field", CHOICES)
def test_a_field_changes_what_it_is_for(world: World, field: str) -> None:
    override, *shared = CHOICES[field]
    assert override.startswith(f"{field}=")
    kind, amount = difference(world, field, world.config(*shared), world.config(*shared, override))
    given = " ".join(shared)
    print(f"\n| `{override}` {f'with `{given}` ' if shared else ''}| {kind} | {amount:.4g} |")
    assert amount > 0


def test_the_same_config_twice_changes_nothing(world: World) -> None:
    """Else every difference above could be noise."""
    cfg = world.config()
    assert changed_rollouts(world.rollouts(cfg), world.rollouts(cfg)) == 0
    assert changed_rollouts(world.rollouts(cfg), world.journal) == 0
    assert changed_samples(world.samples(cfg), world.samples(cfg)) == 0
    assert changed_weights(world.weights(cfg), world.weights(cfg)) == 0
    assert world.evaluation(cfg) == world.evaluation(cfg)


def test_no_field_is_left_out() -> None:
    sections = {name.rpartition(".")[0].removesuffix(".*") for name in field_names()}
    fields = {name for name in field_names() if name not in sections}
    shared = {name for name in fields if name.startswith("sft.optimizer.")}
    assert fields - shared == set(CHOICES) | ELSEWHERE
    assert not set(CHOICES) & ELSEWHERE

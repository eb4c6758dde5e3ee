"""A config becomes objects, once, before the loop begins: no feature flag is left for the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_srpo.algorithm import collect_groups
from megatron_srpo.checkpoints import Checkpoints
from megatron_srpo.colocation import Colocation
from megatron_srpo.config import Config
from megatron_srpo.engines.megatron.backend import backend_of
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.evaluate import Attempt, HeldOut, attempt_sums, evaluate
from megatron_srpo.exchange import exchange
from megatron_srpo.hf_folder import read_config
from megatron_srpo.inputs import Inputs, prompt_set
from megatron_srpo.journal import Journal, Replay, Resumed, read_step
from megatron_srpo.kept import KeepingGenerator, read_kept
from megatron_srpo.metrics import Sums
from megatron_srpo.mismatch import MismatchAlarm
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.plan.memory import planned_gib
from megatron_srpo.plan.setup import setup_here
from megatron_srpo.profile.page import active_weights
from megatron_srpo.profile.profile import NoProfile, Profile, StepProfile
from megatron_srpo.protocols import Collect, CreditRule, Judge, Learner, PromptSource
from megatron_srpo.replica import LeaderJudge, LeaderRule
from megatron_srpo.retention import Labelled, OwnAnswers
from megatron_srpo.rollouts import Roles
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.stopping import StopPoints
from megatron_srpo.stopwatch import Stopwatch, TimedGenerator
from megatron_srpo.turns import TakeTurns
from megatron_srpo.types import Batch, Group, Sample
from megatron_srpo.weight_sync import WeightSync, probe_context

Auxiliary = Callable[[int, Sequence[Group]], list[Sample]]
"""(step, its groups) -> samples of losses beside the policy loss; collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the loop works with."""

    cfg: Config
    mesh: Mesh
    data: PromptSource
    collect: Collect
    judge: LeaderJudge
    credit: CreditRule
    auxiliary: Auxiliary
    record: Callable[[int, Sequence[Group]], None]
    """Writes a step's groups to the journal, where this process is its replica's leader."""
    exchange: Callable[[Sequence[Sample]], Batch]
    """Samples of all replicas -> this process's batch; collective."""
    learner: Learner
    engine: VllmGenerator
    completions: KeepingGenerator
    """Of the engine's present weights."""
    weight_sync: WeightSync
    mismatch: MismatchAlarm
    evaluate: Callable[[], Sums]
    gpu: Colocation
    stopwatch: Stopwatch
    first_step: int
    replayed: range
    """Steps whose rollouts come from a journal."""
    checkpoints: Checkpoints
    profile: Profile


def assemble(
    cfg: Config,
    inputs: Inputs,
    mesh: Mesh,
    replay: Path | None,
    gpu: Colocation,
    profiled: range = range(0),
) -> Run:
    """Collective: every rank builds its shard of both engines. `profiled`: steps of a profile."""
    stopwatch = gpu.stopwatch
    learner, engine = build_engines(cfg, mesh, gpu)
    kept = read_kept(RunFolder(cfg.run_dir).kept) if mesh.is_leader else {}
    completions = KeepingGenerator(engine=engine, known=mesh.share(kept))
    judge = LeaderJudge(inner=inputs.judge, mesh=mesh, stopwatch=stopwatch)
    roles = Roles(
        generator=TimedGenerator(completions, stopwatch),
        tokenizer=inputs.tokenizer,
        judge=judge,
        rule=LeaderRule(rule=inputs.rule, mesh=mesh),
    )
    replica = {"replica": mesh.replica, "num_replicas": mesh.num_replicas}
    shares = [(each.share(**replica), replace(judge, inner=each.judge)) for each in inputs.sets]
    folder, held = RunFolder(cfg.run_dir), inputs.progress.journalled
    journal = Journal(folder=folder.rollouts, **replica, held=held)
    live = partial(collect_groups, roles=roles, cfg=cfg)
    draw = Replay(folder=RunFolder(replay).rollouts) if replay else live
    own = Replay(folder=folder.rollouts)
    collect = Resumed(replay=own, held=held, draw=draw) if held else draw
    data = prompt_set(cfg, inputs.prompts, **replica)
    return Run(
        cfg=cfg,
        mesh=mesh,
        data=data,
        collect=collect,
        judge=judge,
        credit=inputs.credit,
        auxiliary=auxiliary_samples(cfg, inputs, mesh),
        record=journal.write if mesh.is_leader else _record_nothing,
        exchange=partial(
            exchange,
            mesh=mesh,
            layout=PackLayout.on(
                mesh, max_tokens=cfg.micro_batch_tokens, fp8_multiple=cfg.fp8.token_multiple
            ),
            with_silent=cfg.loss.kl_coef > 0,
        ),
        learner=learner,
        engine=engine,
        completions=completions,
        weight_sync=build_weight_sync(cfg, inputs, mesh, learner, engine, gpu),
        mismatch=MismatchAlarm.of(cfg),
        evaluate=partial(held_out_sums, shares, roles, cfg),
        gpu=gpu,
        stopwatch=stopwatch,
        first_step=inputs.progress.step,
        replayed=range(cfg.num_steps) if replay else held,
        checkpoints=Checkpoints(folder.checkpoints, cfg, learner=learner, data=data, mesh=mesh),
        profile=build_profile(cfg, inputs, mesh, stopwatch, profiled),
    )


def build_profile(
    cfg: Config, inputs: Inputs, mesh: Mesh, stopwatch: Stopwatch, steps: range
) -> Profile:
    """Of the first rank, if any steps are wanted."""
    if not steps or mesh.rank:
        return NoProfile()
    return StepProfile(
        steps=steps,
        folder=RunFolder(cfg.run_dir).profile,
        stopwatch=stopwatch,
        active_weights=active_weights(inputs.shapes, read_config(cfg.model)),
        num_gpus=mesh.world_size,
    )


def _record_nothing(step: int, groups: Sequence[Group]) -> None:
    """The other processes of a replica hold what its leader writes."""


def build_engines(
    cfg: Config, mesh: Mesh, gpu: Colocation
) -> tuple[MegatronLearner, VllmGenerator]:
    """Trainer and rollout engine; on a GPU the trainer has lent what it can, and the engine sleeps:
    a weight sync wakes it. Collective."""
    park = cfg.colocation.park if torch.cuda.is_available() else ()
    if planned := setup_here(cfg, num_gpus=mesh.world_size):
        gpu.planned_gib = planned_gib(planned)
    with gpu.building():
        learner = build_learner(cfg, mesh, gpu.points)
        for part in park:
            learner.park(part)
        engine = build_engine(cfg, gpu.points)
        if torch.cuda.is_available():
            engine.sleep()
            gpu.turns = TakeTurns(learner=learner, engine=engine, park=park, parked=[*park])
    return learner, engine


def build_weight_sync(
    cfg: Config,
    inputs: Inputs,
    mesh: Mesh,
    learner: Learner,
    engine: VllmGenerator,
    gpu: Colocation,
) -> WeightSync:
    """From the one to the other, with a prompt as its probe."""
    return WeightSync(
        learner=learner,
        engine=engine,
        shapes=inputs.shapes,
        probe=probe_context(inputs.prompts[0], cfg.rollout.max_model_len),
        temperature=cfg.rollout.temperature,
        max_logprob_diff=cfg.max_logprob_diff,
        gather=mesh.gather,
        turns=gpu.turns,
    )


def build_engine(cfg: Config, points: StopPoints) -> VllmGenerator:
    """This process's part of a rollout engine, without weights; collective over its replica."""
    return VllmGenerator(
        cfg.model,
        cfg.rollout,
        dtype=cfg.dtype,
        is_fp8=cfg.fp8.rollout,
        has_weights=False,
        before_step=points.step,
    )


def build_learner(cfg: Config, mesh: Mesh, points: StopPoints) -> MegatronLearner:
    """The policy that is trained, with the weights of `cfg.model`; collective."""
    return MegatronLearner(
        cfg.model,
        mesh,
        dtype=getattr(torch, cfg.dtype),
        temperature=cfg.rollout.temperature,
        optimizer=cfg.optimizer,
        loss=cfg.loss,
        num_steps=cfg.num_steps,
        kernels=cfg.kernels,
        backend=backend_of(cfg),
        points=points,
    )


def held_out_sums(shares: Sequence[tuple[HeldOut, Judge]], roles: Roles, cfg: Config) -> Sums:
    """One replica's share of the evaluation of the policy as it is."""
    attempts: list[Attempt] = []
    for held_out, judge in shares:
        attempts += evaluate(
            held_out,
            generator=roles.generator,
            tokenizer=roles.tokenizer,
            judge=judge,
            cfg=cfg,
        )
    return attempt_sums(attempts, cfg)


def auxiliary_samples(cfg: Config, inputs: Inputs, mesh: Mesh) -> Auxiliary:
    """Samples of the losses beside the policy loss."""
    replica = {"replica": mesh.replica, "num_replicas": mesh.num_replicas}
    if cfg.retention.source == "labelled":
        if not inputs.retained:
            return lambda step, groups: []
        return Labelled(demonstrations=inputs.retained, cfg=cfg, **replica).samples
    own = OwnAnswers(
        cfg=cfg,
        tokenizer=inputs.tokenizer,
        gather=lambda answers: mesh.gather(answers if mesh.is_leader else []),
        **replica,
    )
    own.recall(inputs.progress.step, partial(read_step, RunFolder(cfg.run_dir).rollouts))
    return own.samples

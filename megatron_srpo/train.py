"""The loop: prompts -> rollouts -> journal -> update -> weight sync, step by step."""

from __future__ import annotations

import contextlib
import resource
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from megatron_srpo.algorithm import to_samples
from megatron_srpo.assembly import Run, assemble
from megatron_srpo.batching import mini_batches
from megatron_srpo.claim import claimed
from megatron_srpo.colocation import Colocation
from megatron_srpo.config import Config
from megatron_srpo.engines.megatron.backend import backend_of
from megatron_srpo.engines.megatron.mesh import Mesh, destroy_mesh
from megatron_srpo.export import save_hf
from megatron_srpo.guard import Guard
from megatron_srpo.inputs import Inputs
from megatron_srpo.kept import write_kept
from megatron_srpo.metrics import GENERATED, Sums, combine, rollout_sums
from megatron_srpo.payoff import verdict
from megatron_srpo.plan.search import verdict as plan_verdict
from megatron_srpo.plan.setup import setup_here
from megatron_srpo.preflight import checked_mesh
from megatron_srpo.resume import begin
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.stopping import StopRequested
from megatron_srpo.telemetry import Telemetry
from megatron_srpo.types import AlarmError, Group
from megatron_srpo.watchdog import Watchdog, ended_after

GUARDED = timedelta(hours=24)
"""In a collective: what hangs is ended by the guard, which can say where all ranks are."""


def train(
    cfg: Config, inputs: Inputs, replay: Path | None = None, profiled: range = range(0)
) -> bool:
    """Run the config, from where its run folder has come to; or, with `replay`, train on the
    rollouts in that run's folder. `profiled` steps leave a profile. Whether it came to the end: it
    may have been asked to stop."""
    mesh = checked_mesh(
        cfg.parallel, rollout_tp=cfg.rollout.tp, run_dir=cfg.run_dir, longest_wait=GUARDED
    )
    is_finished = train_on(mesh, cfg, inputs, replay, profiled)
    with ended_after(cfg.deadlines.other_s):
        destroy_mesh()
    return is_finished


def train_on(
    mesh: Mesh,
    cfg: Config,
    inputs: Inputs,
    replay: Path | None = None,
    profiled: range = range(0),
) -> bool:
    """The same on processes that have found each other."""
    folder, gpu = RunFolder(cfg.run_dir), Colocation.on(mesh)
    with Guard(mesh, gpu, Watchdog(cfg=cfg.deadlines), folder=folder) as guard:
        run = assemble(cfg, inputs, mesh, replay, gpu, profiled)
        seen = mesh.gather(inputs.progress)
        with claimed(folder, partial(begin, cfg, seen, replay), rank=mesh.rank, gather=mesh.gather):
            is_finished = go_on(run, folder, inputs, guard)
            mesh.gather(None)  # nobody leaves while another still works
        run.engine.close()
    return is_finished


def go_on(run: Run, folder: RunFolder, inputs: Inputs, guard: Guard) -> bool:
    """From the checkpoint, if there is one, to the trained policy, or to where it is asked to stop.
    Collective."""
    cfg, mesh, progress = run.cfg, run.mesh, inputs.progress
    with Telemetry(
        folder if mesh.rank == 0 else None,
        cfg.log,
        name=f"train {cfg.algorithm.resets}",
        num_steps=cfg.num_steps,
        stopwatch=run.stopwatch,
        first_step=progress.step,
    ) as telemetry:
        if inputs.dropped:
            telemetry.say(
                f"{len(inputs.dropped)} prompts are longer than {cfg.data.max_prompt_tokens} "
                f"tokens and were left out: {', '.join(inputs.dropped[:5])} ..."
            )
        for note in (*backend_of(cfg).notes, *run.judge.inner.notes):
            telemetry.say(note)
        if planned := setup_here(cfg, num_gpus=mesh.world_size):
            telemetry.say(plan_verdict(planned))
        if progress.summary:
            telemetry.say(progress.summary)
        if progress.checkpoint:
            with run.gpu.saving():
                run.checkpoints.load(progress.checkpoint)
        run.stopwatch.take()  # the first step does not pay for building the engines
        try:
            loop(run, telemetry)
        except StopRequested:
            with run.gpu.saving():
                save(run, folder)
            seconds = time.monotonic() - guard.asked_at
            telemetry.say(f"stopped by {guard.asked_by}, saved after {seconds:.1f} s")
            return False
        run.judge.tell_failures()
        run.checkpoints.finish()
        if mesh.rank == 0:
            shutil.rmtree(folder.kept, ignore_errors=True)
            if said := verdict(folder.read_metrics()):
                telemetry.say(said)
        with run.gpu.saving():
            save_hf(folder.hf, run.learner, mesh, like=cfg.model)
        telemetry.say(f"run folder: {folder.root}   trained policy: {folder.hf}")
        return True


def save(run: Run, folder: RunFolder) -> None:
    """The state after the last whole step, and what the next one has finished. Collective."""
    mesh = run.mesh
    run.checkpoints.save()
    if mesh.is_leader:
        replica = {"replica": mesh.replica, "num_replicas": mesh.num_replicas}
        with contextlib.suppress(AlarmError):  # a full disk; what is not there is drawn again
            known = run.completions.to_keep(**replica)
            write_kept(folder.kept, known, version=run.engine.weight_version, **replica)


def loop(run: Run, telemetry: Telemetry) -> None:
    """Every step: sync, generate, journal, update. An evaluation's policy is its step's sampler."""
    cfg, gpu = run.cfg, run.gpu
    for step in range(run.first_step, cfg.num_steps):
        run.profile.begin(step)
        prompts = run.data.next(cfg.algorithm.num_prompts)
        with gpu.syncing():
            synced = run.weight_sync(version=step)
        with gpu.generating():
            evaluated = run.evaluate() if step % cfg.eval.every == 0 else {}
            groups = run.collect(prompts, step=step)
            run.weight_sync.cache_probe()
        with run.stopwatch.phase("journal"):
            run.record(step, groups)
        samples = to_samples(groups, run.credit, cfg) + run.auxiliary(step, groups)
        parts = mini_batches(samples, cfg.loss.updates_per_batch)
        batches = [run.exchange(part) for part in parts]
        with gpu.training():
            synced |= run.weight_sync.verdict()
            stats = run.learner.update(batches)
        if warning := check_mismatch(stats, run, step):
            telemetry.say(warning)
        metrics = step_metrics(run, groups, evaluated) | meant(stats, cfg) | synced
        telemetry.log(step, metrics, summary(metrics))
        with gpu.saving():
            run.checkpoints.after(step + 1)
        run.profile.end(step, metrics)
    with gpu.syncing():
        synced = run.weight_sync(version=cfg.num_steps)
    with gpu.generating():
        evaluated = run.evaluate()
    with gpu.training():
        synced |= run.weight_sync.verdict()
    last = of_replicas(evaluated, run.mesh) | synced
    telemetry.log(cfg.num_steps, last, summary(last))


def check_mismatch(stats: dict[str, float], run: Run, step: int) -> str | None:
    """A warning, or an `AlarmError`, if trainer and rollout engine disagree on what was sampled.

    The trainer's log-probs need not be the rollouts' in a replay, which another policy may have
    sampled, or this one on another layout, nor with `rollout.top_p` below 1, which renormalises.
    """
    if step in run.replayed or run.cfg.rollout.top_p < 1:
        return None
    return run.mismatch.hear(step, stats)


def meant(stats: dict[str, float], cfg: Config) -> dict[str, float]:
    """Without the mismatch of a trainer and an engine that samples from a nucleus only."""
    has_nucleus = cfg.rollout.top_p < 1
    return {n: v for n, v in stats.items() if not (has_nucleus and n.startswith("mismatch/"))}


def step_metrics(run: Run, groups: Sequence[Group], evaluated: Sums) -> dict[str, float]:
    """All replicas' rollouts, and this process's time and memory. The log names failed rewards."""
    run.judge.tell_failures()
    sums = rollout_sums(groups, run.cfg) | evaluated
    metrics = of_replicas(sums, run.mesh)
    seconds = run.stopwatch.take()
    generated = sum(metrics.get(name, 0.0) for name in GENERATED)
    speed = {"speed/tokens_per_s": generated / seconds["time/step_s"]}
    memory = {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return metrics | seconds | speed | memory


def of_replicas(sums: Sums, mesh: Mesh) -> dict[str, float]:
    """Metrics of all replicas; the ranks of one replica hold the same sums."""
    return combine(mesh.gather(sums if mesh.is_leader else {}))


def summary(metrics: dict[str, float]) -> str:
    """What the terminal shows of a step."""
    shown = {
        "reward": metrics.get("reward/mean"),
        "pass": metrics.get("pass_rate/base"),
        "suffix": metrics.get("pass_rate/suffix"),
    }
    held_out = {int(n.rpartition("_")[2]): v for n, v in metrics.items() if "/pass_at_" in n}
    shown |= {f"held-out pass@{k}": held_out[k] for k in sorted(held_out)[:1]}
    words = [f"{name} {value:.2f}" for name, value in shown.items() if value is not None]
    if "speed/tokens_per_s" in metrics:
        words.append(f"{metrics['speed/tokens_per_s']:.0f} tok/s")
    return "  ".join(words)

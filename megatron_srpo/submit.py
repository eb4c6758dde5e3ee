"""How does a run become batch jobs?   config, site file -> sbatch command line, plan

What the run would refuse is refused here, before the queue; slurm/ holds what the jobs run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_srpo.config import Config
from megatron_srpo.config_file import dump_config
from megatron_srpo.engines.megatron.backend import machine_for
from megatron_srpo.inputs import read_eval_inputs, read_inputs
from megatron_srpo.plan.hardware import Gpu
from megatron_srpo.plan.search import check_state, verdict
from megatron_srpo.plan.setup import Setup
from megatron_srpo.plan.shape import read_shape
from megatron_srpo.types import InputError

SCRIPTS = Path(__file__).parents[1] / "slurm"
LOGS = Path("logs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the site file says."""

    path: Path
    environment: Mapping[str, str]
    """The user's, and what the file exports: sbatch reads its SBATCH_... ."""
    tasks_per_node: int

    @property
    def options(self) -> list[str]:
        """NAME=value of all that sbatch reads from there."""
        names = sorted(name for name in self.environment if name.startswith("SBATCH_"))
        return [f"{name}={self.environment[name]}" for name in names]


def submit(
    cfg: Config,
    arguments: Sequence[str],
    *,
    command: str,
    num_nodes: int,
    num_jobs: int,
    is_dry: bool,
    gpu: Gpu | None,
    environment: Mapping[str, str],
    scripts: Path = SCRIPTS,
) -> None:
    """Prints the resolved config, the plan and the command line; runs that, `num_jobs` times.

    `arguments`: config file and overrides, from which `cfg` was made. `command`: train or eval.
    `gpu`: what the nodes have, if the user says it. `environment`: the user's, which the jobs get.
    Raises `InputError` for what the run would refuse on so many nodes, and what sbatch refuses.
    """
    script = scripts / f"{command}.sbatch"
    if not script.is_file():
        raise InputError(f"{script}: no such file; submit from a checkout, which has slurm/")
    site = read_site(scripts, environment)
    num_processes = num_nodes * site.tasks_per_node
    if command == "train":
        lines = _train_plan(cfg, num_processes, gpu)
    else:
        lines = _eval_plan(cfg, num_processes)
    name, tasks = cfg.run_dir.resolve().name, site.tasks_per_node
    words = sbatch_words(script, arguments, name=name, num_nodes=num_nodes, tasks=tasks)
    print(dump_config(cfg))
    print(f"{num_nodes} nodes x {tasks} = {num_processes} processes")
    print("\n".join(lines))
    print(" ".join([*site.options, shlex.join(words)]), flush=True)
    for _ in range(0 if is_dry else num_jobs):
        print(_sbatch(words, site), flush=True)


def read_site(scripts: Path, environment: Mapping[str, str]) -> Site:
    """As bash reads the file that `MEGATRON_SRPO_SITE` names; by default site.sh in `scripts`."""
    path = Path(environment.get("MEGATRON_SRPO_SITE", scripts / "site.sh"))
    if not path.is_file():
        raise InputError(f"{path}: no such file; copy {scripts / 'site.example.sh'} there, edit it")
    program = 'here=$1; source "$2" >&2 && export TASKS_PER_NODE && env -0'
    done = subprocess.run(
        ["bash", "-c", program, "site", str(scripts), str(path.absolute())],
        env=environment,
        capture_output=True,
    )
    if done.returncode:
        said = " ".join(os.fsdecode(done.stderr).split())
        raise InputError(f"{path}: {said or 'its last command failed'}")
    lines = (os.fsdecode(entry).partition("=") for entry in done.stdout.split(b"\0") if entry)
    exported = {name: value for name, _, value in lines}
    tasks = exported.get("TASKS_PER_NODE", "")
    if not tasks.isdigit() or not int(tasks):
        raise InputError(f"{path}: TASKS_PER_NODE={tasks!r} must be a number of GPUs")
    return Site(path=path, environment=exported, tasks_per_node=int(tasks))


def sbatch_words(
    script: Path, arguments: Sequence[str], *, name: str, num_nodes: int, tasks: int
) -> list[str]:
    """The command line. Of jobs with one name Slurm runs one after the other (singleton)."""
    options = {
        "nodes": num_nodes,
        "ntasks-per-node": tasks,
        "job-name": name,
        "dependency": "singleton",
        "output": LOGS / "%x-%j.log",
    }
    return [
        "sbatch",
        *(f"--{key}={value}" for key, value in options.items()),
        str(script),
        *arguments,
    ]


def _sbatch(words: Sequence[str], site: Site) -> str:
    try:
        LOGS.mkdir(exist_ok=True)
        done = subprocess.run(words, env=site.environment, capture_output=True, text=True)
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; submit where Slurm is, from a folder that can be "
            "written to, or give --dry-run"
        ) from error
    if done.returncode:
        raise InputError(" ".join(done.stderr.split()))
    return done.stdout.strip()


def _train_plan(cfg: Config, num_processes: int, gpu: Gpu | None) -> list[str]:
    inputs = read_inputs(cfg, num_processes=num_processes, machine=machine_for(cfg))
    if inputs.progress.is_finished:
        raise InputError(f"run_dir={cfg.run_dir}: this run is finished")
    layout, algorithm, every = cfg.parallel, cfg.algorithm, cfg.checkpoint.every
    num_copies = num_processes // (layout.tp * layout.pp * layout.cp)
    num_engines = num_processes // cfg.rollout.tp
    num_prompts = algorithm.num_prompts // num_engines
    saved = f"every {every} steps and at a stop" if every else "at a stop only (checkpoint.every=0)"
    return [
        *([] if gpu is None else [_memory_plan(cfg, num_processes, gpu)]),
        f"policy: tp {layout.tp} x pp {layout.pp} (vpp {layout.vpp}) x cp {layout.cp} x "
        f"dp {num_copies}; ep {layout.ep}",
        f"rollouts: {num_engines} engines of tp {cfg.rollout.tp}; in a step {num_prompts} prompts "
        f"and {num_prompts * algorithm.num_rollouts} trained rollouts each",
        f"steps: {cfg.num_steps}, from {inputs.progress.step}; checkpoints: {saved}",
    ]


def _memory_plan(cfg: Config, num_gpus: int, gpu: Gpu) -> str:
    setup = Setup(cfg=cfg, shape=read_shape(cfg.model), gpu=gpu, num_gpus=num_gpus)
    check_state(setup)
    return verdict(setup)


def _eval_plan(cfg: Config, num_processes: int) -> list[str]:
    inputs = read_eval_inputs(cfg, num_processes=num_processes, machine=machine_for(cfg))
    num_problems = sum(len(held_out.prompts) for held_out in inputs.sets)
    num_responses = cfg.eval.num_seeds * cfg.eval.num_samples + cfg.eval.greedy
    return [
        f"rollouts: {num_processes // cfg.rollout.tp} engines of tp {cfg.rollout.tp}; "
        f"{num_problems} problems, {num_responses} responses each"
    ]

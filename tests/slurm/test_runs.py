"""The program itself under Slurm: submitted, stopped, killed; it ends as if left alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from megatron_srpo.__main__ import main
from tests.e2e.small_run import write_small_run
from tests.e2e.test_command_line import metrics
from tests.slurm.cluster import AS_IN_A_CGROUP, Cluster, wait_for
from tests.slurm.jobs import PROGRAM, RANKS

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_srpo"
RESPONSE = re.compile(r'"text": "[^"]*"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run in a job of its own."""

    cluster: Cluster
    folder: Path
    """Its run folder."""
    number: str

    def wait_for_step(self, step: int) -> None:
        wait_for(f"step {step}", lambda: step in self.steps(), seconds=400)

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    @property
    def said(self) -> str:
        """By the batch script."""
        (log,) = Path("logs").glob(f"*-{self.number}.log")
        return log.read_text()

    def said_at(self, words: str) -> float:
        (line,) = (line for line in self.said.splitlines() if words in line)
        return datetime.fromisoformat(line.split()[0]).timestamp()

    def finish(self) -> None:
        record = self.cluster.finish(self.number, seconds=900)
        logs = "".join(path.read_text() for path in Path("logs").glob(f"*-{self.number}/*/*.log"))
        assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0"), self.said + logs

    def journal(self) -> dict[str, list[str]]:
        """File -> its responses."""
        files = (self.folder / "rollouts").glob("*.jsonl")
        return {path.name: RESPONSE.findall(path.read_text("utf-8")) for path in files}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitter:
    cluster: Cluster
    config: Path
    site: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, name: str, *words: str) -> Run:
        folder = self.config.parent / name
        assert main(["submit", str(self.config), f"run_dir={folder}", *words]) == 0
        number = self.capsys.readouterr().out.split()[-1]
        return Run(cluster=self.cluster, folder=folder, number=number)


@pytest.fixture
def submit(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Submitter:
    """`megatron-srpo submit` in this process, of a small run."""
    site = tmp_path / "site.sh"
    site.write_text(
        f'MEGATRON_SRPO=({AS_IN_A_CGROUP} "{sys.executable}" -m {PACKAGE})\n'
        f'export PYTHONPATH="{ROOT}" GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1\n'
        "TASKS_PER_NODE=${TASKS_PER_NODE:-1}\n"
    )
    for name, value in (cluster.environment | {"MEGATRON_SRPO_SITE": str(site)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    config = write_small_run(tmp_path)
    return Submitter(cluster=cluster, config=config, site=site, capsys=capsys)


def test_jobs_of_a_chain_run_one_after_the_other_and_only_the_first_has_work(
    submit: Submitter,
) -> None:
    with submit.site.open("a") as site:
        site.write(f"MEGATRON_SRPO=({PROGRAM})\nTASKS_PER_NODE=2\n")
    assert main(["submit", str(submit.config), "--nodes=2", "--chain=2"]) == 0
    numbers = [line.split()[-1] for line in submit.capsys.readouterr().out.splitlines()[-2:]]
    first, second = (submit.cluster.finish(number) for number in numbers)
    assert first["JobState"] == second["JobState"] == "COMPLETED"
    assert first["EndTime"] <= second["StartTime"]
    run = submit.config.parent / "run"
    for rank in RANKS:
        assert len((run / f"starts-{rank}").read_text().splitlines()) == 2
        steps = (run / f"steps-{rank}").read_text().split()[1::2]
        assert steps == [str(step) for step in range(10)]


def test_what_slurm_refuses_is_refused_at_submission(submit: Submitter) -> None:
    with submit.site.open("a") as site:
        site.write("export SBATCH_PARTITION=nowhere\n")
    assert main(["submit", str(submit.config)]) == 2
    assert "invalid partition" in submit.capsys.readouterr().err
    assert submit.cluster.ask("squeue", "-h", "-n", "run") == ""


def test_a_run_that_slurm_asks_to_stop_saves_itself_and_goes_on_in_another_start(
    submit: Submitter,
) -> None:
    run = submit("run", "--nodes=2", "num_steps=10", "eval.every=10")
    run.wait_for_step(1)
    run.cluster.ask("scancel", "--batch", "--signal=USR1", run.number)
    run.finish()
    assert run.steps() == list(range(11))
    assert "the cause is 75" in run.said and "attempt 1: done" in run.said
    log = (run.folder / "log.txt").read_text()
    assert log.count("stopped by SIGUSR1") == 1 and log.count("goes on after step") == 1
    assert (run.folder / "hf" / "config.json").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_requeued_and_killed_is_the_undisturbed_one(
    submit: Submitter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints (pytest -s) the seconds from signal to saved, and from requeue to the next step."""
    monkeypatch.setenv("TASKS_PER_NODE", "2")
    words = ("--nodes=2", "num_steps=12", "parallel.tp=2", "checkpoint.every=3")
    calm = submit("calm", *words)
    calm.finish()

    run = submit("run", *words)
    run.wait_for_step(2)
    asked = time.time()
    run.cluster.ask("scancel", "--batch", "--signal=USR1", run.number)
    wait_for("requeue", lambda: "is requeued" in run.said, seconds=180)
    newest = max((run.folder / "checkpoints").glob("*/manifest.json"))
    saved, step = newest.stat().st_mtime, max(run.steps())
    run.wait_for_step(step + 1)
    gone_on = (run.folder / "metrics.jsonl").stat().st_mtime
    started = run.said_at("attempt 1: n")
    with capsys.disabled():
        print(f"\nsignal to saved: {saved - asked:.1f} s; ", end="")
        print(f"requeue to start: {started - run.said_at('is requeued'):.1f} s; ", end="")
        print(f"start to the next step: {gone_on - started:.1f} s")

    run.wait_for_step(step + 2)
    run.cluster.ask("scontrol", "requeue", run.number)
    run.wait_for_step(step + 4)
    kill_a_rank(run)
    run.finish()
    assert "attempt 3: done" in run.said
    assert run.journal() == calm.journal()
    for name in ("step", "loss", "grad_norm", "reward/mean", "tokens/trained"):
        # Not what came from the prefix cache, which is cold where a stopped step goes on.
        found, right = (metrics(each.folder) for each in (run, calm))
        assert [line.get(name, 0.0) for line in found] == pytest.approx(
            [line.get(name, 0.0) for line in right], rel=1e-4
        ), name


@pytest.mark.slow
def test_a_run_goes_on_past_its_time_limit_a_preemption_and_a_dead_node(submit: Submitter) -> None:
    """One run of 600 steps; what ends its attempts is Slurm's own doing."""
    with submit.site.open("a") as site:
        site.write("export SBATCH_TIMELIMIT=2 SBATCH_SIGNAL=B:USR1@60\n")
    run = submit("run", "--nodes=2", "num_steps=600", "eval.every=600", "checkpoint.every=5")
    run.wait_for_step(1)
    wait_for("the time limit", lambda: "is requeued" in run.said, seconds=400)
    step = max(run.steps())
    run.wait_for_step(step + 5)
    nodes = run.cluster.job(run.number)["NodeList"]
    folder = run.folder.parent
    urgent = run.cluster.submit(
        "-p", "urgent", "-w", nodes, "-N2", "--exclusive", "--wrap=sleep 1", folder=folder
    )
    run.cluster.finish(urgent, seconds=200)
    step = max(run.steps())
    run.wait_for_step(step + 5)
    names = run.cluster.ask(
        "scontrol", "show", "hostnames", run.cluster.job(run.number)["NodeList"]
    )
    run.cluster.kill_node(names.split()[-1])
    run.finish()
    assert run.steps() == list(range(601))
    log = (run.folder / "log.txt").read_text()
    assert log.count("stopped by SIGUSR1") >= 1 and log.count("stopped by SIGTERM") == 1, log
    assert log.count("goes on after step") >= 3
    assert (run.folder / "hf" / "config.json").exists()


def kill_a_rank(run: Run) -> None:
    """kill -9, of any one that trains in this run's folder."""
    found = subprocess.run(["pgrep", "-f", f"run_dir={run.folder}"], capture_output=True, text=True)
    processes = {int(number): psutil.Process(int(number)) for number in found.stdout.split()}
    pythons = {number for number, p in processes.items() if p.cmdline()[1:3] == ["-m", PACKAGE]}
    # Not a rank's helpers, which are copies of it.
    ranks = [number for number in pythons if processes[number].ppid() not in pythons]
    assert len(ranks) == 4, processes
    os.kill(random.choice(ranks), signal.SIGKILL)

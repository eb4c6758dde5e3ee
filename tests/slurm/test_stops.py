"""What the batch scripts make of each way in which a job can stop, against a real Slurm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import RANKS, Outcome, Outcomes, Scenario, begin, played

# --- what is done to each job --------------------------------------------------------------------


def undisturbed(cluster: Cluster, folder: Path) -> Outcome:
    words = ("eval.pass_at=[1,2]", "reward=a b.py:*", "steps=10")
    return begin(cluster, folder, *words, options=("--gpus-per-node=2",)).finish()


def asked_to_stop(cluster: Cluster, folder: Path) -> Outcome:
    job = begin(cluster, folder, "steps=20", "hold=12")
    job.wait_for_step(11)
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)  # as Slurm before a time limit
    return job.finish()


def requeued(cluster: Cluster, folder: Path) -> Outcome:
    job = begin(cluster, folder, "steps=20", "hold=12")
    job.wait_for_step(11)
    cluster.ask("scontrol", "requeue", job.number)
    return job.finish()


def preempted(cluster: Cluster, folder: Path) -> Outcome:
    nodes = ",".join(cluster.nodes[-2:])
    job = begin(cluster, folder, "steps=20", "hold=12", options=("-w", nodes))
    job.wait_for_step(11)
    urgent = begin(cluster, folder / "urgent", "steps=3", options=("-p", "urgent", "-w", nodes))
    urgent.finish().check_whole(steps=3, attempts=1)
    return job.finish()


def cancelled(cluster: Cluster, folder: Path) -> Outcome:
    job = begin(cluster, folder, "hold=5")
    job.wait_for_step(3)
    cluster.ask("scancel", job.number)
    outcome = job.finish()
    # It has not ended while its script could still requeue it.
    wait_for("the script's end", lambda: "Slurm itself" in outcome.said)
    return job.finish()


def chained(cluster: Cluster, folder: Path) -> Outcome:
    """Two jobs of one name; the first is cancelled."""
    job = begin(cluster, folder, "steps=20", "hold=12", options=("--dependency=singleton",))
    again = job.submit_again()
    job.wait_for_step(11)
    cluster.ask("scancel", job.number)
    return again.finish()


def broken_once(cluster: Cluster, folder: Path) -> Outcome:
    return begin(cluster, folder, "steps=20", "hold=12", "end=3:10:0:1").finish()


def broken_always(cluster: Cluster, folder: Path) -> Outcome:
    return begin(cluster, folder, "end=1:*:*:1", site="MAX_RESTARTS=1").finish()


def refusing(cluster: Cluster, folder: Path) -> Outcome:
    return begin(cluster, folder, "end=[0-3]:9:*:2").finish()


def alarmed(cluster: Cluster, folder: Path) -> Outcome:
    return begin(cluster, folder, "hold=8", "end=2:4:*:3").finish()


def without_site(cluster: Cluster, folder: Path) -> Outcome:
    return begin(cluster, folder, site=None).finish()


def evaluating(cluster: Cluster, folder: Path) -> Outcome:
    return begin(cluster, folder, script="eval.sbatch").finish()


def put_on_path(folder: Path, name: str, program: str) -> str:
    """A bash program of that name, found before others; returns the line for the site file."""
    path = folder / "bin" / name
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/bash\n{program}")
    path.chmod(0o755)
    return f'PATH="{path.parent}:$PATH"'


# Stand-ins for the two, which are not installed: they note their own words and leave them out.
APPTAINER = """
printf '%s\\n' "${@:1:7}" >>container
exec "${@:8}"
"""
PYXIS = """
words=()
for word; do
    if [[ $word == --*container-* ]]; then echo "$word" >>container; else words+=("$word"); fi
done
exec /usr/bin/srun "${words[@]}"
"""


def in_apptainer(cluster: Cluster, folder: Path) -> Outcome:
    path = put_on_path(folder, "apptainer", APPTAINER)
    site = f"CONTAINER='apptainer:/my images/a.sif'\nMOUNTS=/from:/to\n{path}"
    return begin(cluster, folder, "reward=a b", site=site).finish()


def in_pyxis(cluster: Cluster, folder: Path) -> Outcome:
    path = put_on_path(folder, "srun", PYXIS)
    site = f"CONTAINER='pyxis:/my images/a.sqsh'\n{path}"
    return begin(cluster, folder, "reward=a b", site=site).finish()


SCENARIOS = (
    preempted, broken_always, asked_to_stop, requeued, broken_once, alarmed, refusing, undisturbed,
    cancelled, chained, without_site, evaluating, in_apptainer, in_pyxis,
)  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with played(SCENARIOS, cluster, tmp_path_factory.mktemp("jobs")) as outcomes:
        yield outcomes


# --- what has become of it -----------------------------------------------------------------------


def test_a_job_starts_a_task_per_gpu_with_the_words_of_its_command_line(outcomes: Outcomes) -> None:
    outcome = outcomes[undisturbed].result()
    outcome.check_whole(steps=10, attempts=1)
    starts = [json.loads(line) for rank in RANKS for line in outcome.job.lines("starts", rank)]
    config = str(outcome.job.folder / "c d.yaml")
    words = ["train", config, "eval.pass_at=[1,2]", "reward=a b.py:*", "steps=10"]
    assert [start["argv"] for start in starts] == [words] * 4
    assert [start["cwd"] for start in starts] == [str(outcome.job.folder)] * 4
    places = [(start["RANK"], start["LOCAL_RANK"], start["WORLD_SIZE"]) for start in starts]
    assert places == [("0", "0", "4"), ("1", "1", "4"), ("2", "0", "4"), ("3", "1", "4")]
    # Each task sees all GPUs of its node, which NCCL wants, and takes the one of its local rank.
    assert {start["CUDA_VISIBLE_DEVICES"] for start in starts} == {"0,1"}
    meetings = {(start["MASTER_ADDR"], start["MASTER_PORT"]) for start in starts}
    assert meetings == {("127.0.0.1", str(20000 + int(outcome.job.number) % 10000))}


def test_each_attempt_leaves_a_log_per_node_whose_lines_name_their_task(outcomes: Outcomes) -> None:
    outcome = outcomes[broken_once].result()
    (logs,) = outcome.job.folder.glob(f"logs/broken_once-{outcome.job.number}")
    first, second = sorted(logs.iterdir())
    assert (first.name, second.name) == ("attempt-0", "attempt-1")
    nodes = sorted(second.glob("*.log"))
    lines = [sorted(node.read_text().splitlines()) for node in nodes]
    assert lines == [["0: done", "1: done"], ["2: done", "3: done"]]
    assert sum("3: ends with 1" in node.read_text() for node in first.glob("*.log")) == 1


@pytest.mark.parametrize(
    ("play", "signal"), [(asked_to_stop, "SIGUSR1"), (requeued, "SIGTERM"), (preempted, "SIGTERM")]
)
def test_a_stopped_job_goes_on_where_it_was(outcomes: Outcomes, play: Scenario, signal: str):
    outcome = outcomes[play].result()
    outcome.check_whole(steps=20, attempts=2)
    # One signal: at a second one the program leaves without saving.
    assert outcome.signals == [[f"0 {signal}"]] * 4


def test_a_cancelled_job_stays_cancelled(outcomes: Outcomes) -> None:
    outcome = outcomes[cancelled].result()
    assert outcome.state == "CANCELLED" and outcome.attempts == 1, outcome.said


def test_the_next_of_a_chain_waits_until_the_one_before_has_saved(outcomes: Outcomes) -> None:
    outcomes[chained].result().check_whole(steps=20, attempts=1)


def test_a_rank_that_breaks_ends_the_others_and_the_job_is_started_again(
    outcomes: Outcomes,
) -> None:
    outcome = outcomes[broken_once].result()
    outcome.check_whole(steps=20, attempts=2)
    assert "the cause is 1" in outcome.said


def test_a_job_that_breaks_each_time_ends_at_its_last_restart(outcomes: Outcomes) -> None:
    outcome = outcomes[broken_always].result()
    outcome.check(state="FAILED", exit_code="1:0", attempts=2)
    assert outcome.said.count("is not requeued: it was restarted 1 times (MAX_RESTARTS)") == 1


@pytest.mark.parametrize(("play", "code", "speakers"), [(refusing, 2, 4), (alarmed, 3, 1)])
def test_what_would_end_the_same_is_not_started_again(
    outcomes: Outcomes, play: Scenario, code: int, speakers: int
) -> None:
    outcome = outcomes[play].result()
    outcome.check(state="FAILED", exit_code=f"{code}:0", attempts=1)
    logs = "".join(path.read_text() for path in outcome.job.folder.glob("logs/*/attempt-0/*.log"))
    assert logs.count(f"ends with {code}") == speakers  # none was killed before it could say it


def test_a_job_without_a_site_file_says_what_to_copy_where(outcomes: Outcomes) -> None:
    outcome = outcomes[without_site].result()
    outcome.check(state="FAILED", exit_code="2:0", attempts=0)
    scripts = outcome.job.folder.parent / "slurm here"
    said = f"{scripts}/site.sh: no such file; copy {scripts}/site.example.sh there and edit it\n"
    assert outcome.said.endswith(said)


def test_an_evaluation_is_started_in_the_same_way(outcomes: Outcomes) -> None:
    outcome = outcomes[evaluating].result()
    outcome.check_whole(steps=10, attempts=1)
    assert json.loads(outcome.job.lines("starts", 3)[0])["argv"][0] == "eval"


@pytest.mark.parametrize("play", [in_apptainer, in_pyxis])
def test_one_variable_puts_the_program_into_a_container(outcomes: Outcomes, play: Scenario) -> None:
    outcome = outcomes[play].result()
    outcome.check_whole(steps=10, attempts=1)
    work, scripts = outcome.job.folder, outcome.job.folder.parent / "slurm here"
    mounts = f"{work}:{work},{scripts}:{scripts}"
    apptainer = ["exec", "--nv", "--bind", f"{mounts},/from:/to", "--pwd", f"{work}"]
    pyxis = [f"--container-mounts={mounts}", f"--container-workdir={work}"]
    expected: dict[Scenario, list[str]] = {
        in_apptainer: [*apptainer, "/my images/a.sif"] * len(RANKS),
        in_pyxis: ["--container-image=/my images/a.sqsh", *pyxis, "--no-container-mount-home"],
    }
    assert sorted((work / "container").read_text().splitlines()) == sorted(expected[play])
    starts = [json.loads(line) for line in outcome.job.lines("starts", 0)]
    assert [start["argv"] for start in starts] == [["train", f"{work}/c d.yaml", "reward=a b"]]

"""Stops that Slurm itself takes half a minute and more to notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import RANKS, Outcome, Outcomes, begin, played

pytestmark = pytest.mark.slow


def warned_of_its_limit(cluster: Cluster, folder: Path) -> Outcome:
    limit = ("--time=1", "--signal=B:USR1@20")
    return begin(cluster, folder, "steps=20", "hold=12", options=limit).finish(seconds=300)


def chained_past_its_limit(cluster: Cluster, folder: Path) -> Outcome:
    """Two jobs of one name, without a warning."""
    options = ("--time=1", "--dependency=singleton")
    job = begin(cluster, folder, "steps=20", "hold=12", options=options, script="eval.sbatch")
    again = job.submit_again()
    first = job.finish(seconds=150)
    assert (first.state, first.attempts) == ("TIMEOUT", 1), first.said
    return again.finish(seconds=150)


def of_a_node_that_dies(cluster: Cluster, folder: Path) -> Outcome:
    job = begin(cluster, folder, "steps=20", "hold=12")
    job.wait_for_step(11)
    nodes = cluster.ask("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"])
    cluster.kill_node(nodes.split()[1])
    return job.finish(seconds=120)


SCENARIOS = (warned_of_its_limit, chained_past_its_limit, of_a_node_that_dies)


@pytest.fixture(scope="module")
def outcomes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    if not cluster.has_namespaces:
        pytest.skip("without namespaces a node's processes would outlive it")
    with played(SCENARIOS, cluster, tmp_path_factory.mktemp("slow_jobs")) as outcomes:
        yield outcomes


def test_a_job_goes_on_past_its_time_limit(outcomes: Outcomes) -> None:
    outcome = outcomes[warned_of_its_limit].result()
    outcome.check_whole(steps=20, attempts=2)
    assert outcome.signals == [["0 SIGUSR1"]] * len(RANKS)


def test_the_next_of_a_chain_goes_on_where_a_time_limit_has_ended_one(outcomes: Outcomes) -> None:
    outcome = outcomes[chained_past_its_limit].result()
    assert outcome.state == "COMPLETED", outcome.said
    assert outcome.steps == [list(range(20))] * len(RANKS)


def test_a_job_whose_node_dies_goes_on_on_others_from_what_is_saved(outcomes: Outcomes) -> None:
    outcome = outcomes[of_a_node_that_dies].result()
    outcome.check(state="COMPLETED", exit_code="0:0", attempts=2)
    for rank, steps in enumerate(outcome.steps):
        assert set(steps) == set(range(20)) and len(steps) - 20 < 5, (rank, steps)

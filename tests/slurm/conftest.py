"""One Slurm for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}: install slurmctld slurmd slurm-client munge")
    folder: Path = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder, num_nodes=32)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()

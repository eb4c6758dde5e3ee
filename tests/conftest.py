"""What all tests share: the environment of the command line, one process group, a tiny policy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.environment import be_one_process_unless_launched, set_environment

set_environment()
if "PYTEST_XDIST_WORKER" in os.environ:  # it has inherited the rendezvous of pytest's first process
    del os.environ["WORLD_SIZE"]
be_one_process_unless_launched()


@pytest.fixture(scope="session")
def mesh() -> Any:
    """This process alone; engines of all tests share it."""
    from megatron_srpo.engines.megatron.mesh import build_mesh

    return build_mesh()


@pytest.fixture(scope="session")
def engines() -> list[object]:
    """Keeps rollout engines alive: vLLM's finalizer takes the process groups with it."""
    return []


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with biases, grouped key-value heads and a tied head, and its tokenizer."""
    from tests.tiny import write_policy

    return write_policy(tmp_path_factory.mktemp("policy"), seed=0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mostly waits begins first: the other process has work until the end."""
    items.sort(key=lambda item: "slurm" not in item.path.parts)

"""Processes that tests start must not join the process group of the test session."""

from __future__ import annotations

import os

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def unlaunched_environment() -> dict[str, str]:
    """This process's environment as if no launcher had started it."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHED}

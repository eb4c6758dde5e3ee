"""One run that was left alone, for whatever is done to others."""

from __future__ import annotations

import pytest

from tests.survival.matrix import Ground, write_run


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("survival")
    return Ground("2 replicas", folder, write_run(folder))

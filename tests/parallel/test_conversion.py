"""What is converted loads on any layout, and what any layout saves is converted back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_srpo.checkpoint_folder import write_manifest
from megatron_srpo.convert import Layout, hf_to_megatron, megatron_to_hf
from megatron_srpo.hf_folder import read_tensors
from tests.parallel import jobs
from tests.parallel.parity import TIED
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, write_policy

PARALLEL = {family: {"tp": 2, "pp": 2} for family in FAMILIES} | {"qwen3_moe": {"ep": 2, "pp": 2}}
"""Four processes each."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    folder = tmp_path_factory.mktemp(family)
    return write_policy(folder, seed=3, family=family, tied=family in TIED, num_layers=4)


@pytest.fixture(scope="module")
def found(
    pool: Pool, mesh: Any, tmp_path_factory: pytest.TempPathFactory, family: str, hf: Path
) -> tuple[Path, list[dict[str, bool]]]:
    """A folder with what Megatron saves in both ways, and what it loads of a converted folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    # Written for another layout: which files hold a tensor must not matter.
    hf_to_megatron(hf, folder / "converted", mesh, layout=Layout(tp=1, pp=4))
    converted = folder / "converted" / "megatron"
    return folder, pool.run(4, jobs.loads_and_saves, hf, converted, folder, **PARALLEL[family])


def test_megatron_loads_a_converted_folder_on_another_layout_bit_by_bit(
    found: tuple[Path, list[dict[str, bool]]],
) -> None:
    for same in found[1]:
        assert len(same) >= 8
        assert all(same.values()), same


@pytest.mark.parametrize("layers", jobs.LAYERS)
def test_what_megatron_saves_on_four_ranks_among_other_things_comes_out_bit_by_bit(
    found: tuple[Path, list[dict[str, bool]]], mesh: Any, tmp_path: Path, hf: Path, layers: str
) -> None:
    checkpoint = found[0] / layers
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf" / "config.json").write_bytes((hf / "config.json").read_bytes())
    write_manifest(checkpoint, dtype="float32", contents=["model", "optimizer"])
    megatron_to_hf(checkpoint, tmp_path / "back", mesh)
    back, right = dict(read_tensors(tmp_path / "back")), dict(read_tensors(hf))
    assert back.keys() == right.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in right.items())

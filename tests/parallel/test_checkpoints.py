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
from tests.parallel.pool import Pool
from tests.tiny import write_policy


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("untied"), seed=3, tied=False)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)], ids=["TP2", "PP2"])
def test_megatron_loads_a_converted_folder_on_another_layout_bit_by_bit(
    pool: Pool, mesh: Any, policy: Path, untied: Path, tmp_path: Path, tp: int, pp: int, tied: bool
) -> None:
    hf = policy if tied else untied
    # Written for the other layout: which files hold a tensor must not matter.
    hf_to_megatron(hf, tmp_path / "checkpoint", mesh, layout=Layout(tp=pp, pp=tp))
    arguments = (hf, tmp_path / "checkpoint" / "megatron")
    for same in pool.run(2, jobs.loads_what_the_folder_has, *arguments, tp=tp, pp=pp):
        assert len(same) >= 8
        assert all(same.values()), same


@pytest.mark.parametrize("numbered", [False, True], ids=["stacked", "numbered"])
def test_what_megatron_saves_on_tp2_x_pp2_among_other_things_comes_out_bit_by_bit(
    pool: Pool, mesh: Any, untied: Path, tmp_path: Path, numbered: bool
) -> None:
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "megatron").mkdir(parents=True)
    pool.run(4, jobs.save_with_more, untied, checkpoint / "megatron", numbered, tp=2, pp=2)
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf" / "config.json").write_bytes((untied / "config.json").read_bytes())
    write_manifest(checkpoint, dtype="float32", contents=["model", "optimizer"])
    megatron_to_hf(checkpoint, tmp_path / "back", mesh)
    found, right = dict(read_tensors(tmp_path / "back")), dict(read_tensors(untied))
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())

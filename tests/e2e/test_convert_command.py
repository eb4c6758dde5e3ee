"""`megatron-srpo convert`: there and back from the command line, verified, or an exit code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_srpo import convert as convert_module
from megatron_srpo.__main__ import main
from megatron_srpo.convert import Layout, hf_to_megatron
from megatron_srpo.types import AlarmError
from megatron_srpo.verify import verify
from tests.tiny import write_policy


@pytest.fixture(autouse=True)
def one_process_group(monkeypatch: pytest.MonkeyPatch, mesh: Any) -> None:
    """The command builds its own; tests share one."""
    monkeypatch.setattr(convert_module, "build_mesh", lambda: mesh)
    monkeypatch.setattr(convert_module, "destroy_mesh", lambda: None)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_goes_there_and_back_and_both_sides_compute_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    (tmp_path / "hf").mkdir()
    hf = write_policy(tmp_path / "hf", seed=1, tied=tied)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    there = ["convert", "--hf", str(hf), "--out", str(checkpoint), "--tp", "2", "--pp", "2"]
    assert main([*there, "--verify"]) == 0
    assert main(["convert", "--ckpt", str(checkpoint), "--out", str(back), "--verify"]) == 0
    assert capsys.readouterr().err.count("verified on 64 random tokens") == 2
    files = {path.name for path in hf.iterdir()}
    assert files == {path.name for path in back.iterdir()}
    assert all((hf / name).read_bytes() == (back / name).read_bytes()
               for name in files if name != "model.safetensors")  # fmt: skip
    right, found = load_file(hf / "model.safetensors"), load_file(back / "model.safetensors")
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


def test_a_cast_is_verified_against_weights_that_are_rounded_alike(
    tmp_path: Path, policy: Path
) -> None:
    half, back = tmp_path / "half", tmp_path / "back"
    cast = ["--dtype", "bfloat16", "--verify"]
    assert main(["convert", "--hf", str(policy), "--out", str(half), *cast]) == 0
    assert main(["convert", "--hf", str(policy), "--out", str(tmp_path / "full")]) == 0
    full = str(tmp_path / "full")
    assert main(["convert", "--ckpt", full, "--out", str(back), *cast]) == 0
    assert all(t.dtype == torch.bfloat16 for t in load_file(back / "model.safetensors").values())


def test_a_checkpoint_of_other_weights_is_an_alarm(tmp_path: Path, policy: Path, mesh: Any) -> None:
    """One number of one norm is off by a thousandth."""
    hf_to_megatron(policy, tmp_path / "checkpoint", mesh, layout=Layout())
    other = tmp_path / "other"
    shutil.copytree(policy, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] *= 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    verify(policy, tmp_path / "checkpoint", mesh)
    with pytest.raises(AlarmError, match="compute other logits"):
        verify(other, tmp_path / "checkpoint", mesh)


def test_what_is_wrong_is_one_line_and_exit_code_2(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--hf", str(policy), "--out", str(policy)], "exists already"),
        (["--ckpt", str(policy), "--out", str(tmp_path / "out")], "it has no manifest.json"),
        (["--hf", str(tmp_path), "--out", str(tmp_path / "out")], "it has no config.json"),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "out"],
        ["--hf", "hf", "--ckpt", "checkpoint", "--out", "out"],
        ["--hf", "hf", "--out", "out", "--tp", "0"],
        ["--hf", "hf", "--out", "out", "--dtype", "float8"],
        ["--hf", "hf", "--out", "out", "more"],
    ],
)
def test_a_command_that_makes_no_sense_is_refused_by_the_parser(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *arguments])
    assert stopped.value.code == 2

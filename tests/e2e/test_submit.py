"""`megatron-srpo submit`: what it refuses, what it prints, what it hands to sbatch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_srpo.__main__ import main
from megatron_srpo.plan.hardware import GPUS
from tests.e2e.small_run import write_small_run

SITE = """
TASKS_PER_NODE=2
export SBATCH_PARTITION=gpu
echo "modules are loaded"
"""
NOTES_ITSELF = """#!/bin/bash
{ printf '%s\\n' "$@"; echo "partition $SBATCH_PARTITION"; env | grep ^TORCH_COMPILE; } >>sbatch.txt
echo "Submitted batch job 7"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run in this folder, where `sbatch` is a program that notes its words."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text(NOTES_ITSELF)
    (bin / "sbatch").chmod(0o755)
    (tmp_path / "site.sh").write_text(SITE)
    monkeypatch.setenv("MEGATRON_SRPO_SITE", str(tmp_path / "site.sh"))
    monkeypatch.setenv("PATH", str(bin), prepend=":")
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.chdir(tmp_path)
    return write_small_run(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that `submit` refuses with, before it has submitted anything."""
    assert main(["submit", *map(str, arguments)]) == 2
    assert not Path("sbatch.txt").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_dry_run_prints_config_plan_and_command_and_submits_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["parallel.tp=2", "eval.pass_at=[1]", "--nodes", "2", "--dry-run"]
    assert main(["submit", str(config), *words]) == 0
    said = capsys.readouterr().out
    resolved, _, plan = said.partition("2 nodes x 2 = 4 processes\n")
    assert yaml.safe_load(resolved)["parallel"]["tp"] == 2
    policy, rollouts, steps, command = plan.splitlines()
    assert policy == "policy: tp 2 x pp 1 (vpp 1) x cp 1 x dp 2; ep 1"
    assert rollouts == (
        "rollouts: 4 engines of tp 1; in a step 1 prompts and 8 trained rollouts each"
    )
    assert steps == "steps: 2, from 0; checkpoints: at a stop only (checkpoint.every=0)"
    script = Path(__file__).parents[2] / "slurm" / "train.sbatch"
    assert command == (
        "SBATCH_PARTITION=gpu sbatch --nodes=2 --ntasks-per-node=2 --job-name=run "
        f"--dependency=singleton --output=logs/%x-%j.log {script} {config} parallel.tp=2 "
        "'eval.pass_at=[1]'"
    )
    assert not Path("sbatch.txt").exists() and not Path("logs").exists()


def test_sbatch_gets_the_site_s_settings_and_the_user_s_environment_for_each_job_of_a_chain(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(config), "localize.template=is {response} wrong?", "--chain=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["Submitted batch job 7"] * 2
    words = Path("sbatch.txt").read_text().splitlines()
    # What this process sets for itself is for this machine, not for the nodes.
    assert words[-3:] == [str(config), "localize.template=is {response} wrong?", "partition gpu"]
    assert words == words[: len(words) // 2] * 2


def test_an_evaluation_has_its_own_script_and_plan(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(config), "--eval", "--dry-run"]) == 0
    *_, plan, command = capsys.readouterr().out.splitlines()
    assert plan == "rollouts: 2 engines of tp 1; 8 problems, 1 responses each"
    assert "/slurm/eval.sbatch " in command


def test_the_example_of_a_site_file_is_one(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = Path(__file__).parents[2] / "slurm" / "site.example.sh"
    monkeypatch.setenv("MEGATRON_SRPO_SITE", str(example))
    assert main(["submit", str(config), "algorithm.num_prompts=8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 nodes x 8 = 8 processes" in said
    assert "\nSBATCH_EXCLUSIVE=exclusive SBATCH_GPUS_PER_NODE=8 SBATCH_MEM_PER_NODE=0 " in said


def test_what_the_run_would_refuse_is_refused_before_the_queue(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown key 'num_step'" in refusal(capsys, config, "num_step=3")
    too_many = refusal(capsys, config, "--nodes=4")
    assert "algorithm.num_prompts=4 does not divide over 8 rollout engines" in too_many


FP8 = ["dtype=bfloat16", "fp8.recipe=blockwise", "fp8.rollout=true", "--dry-run"]


def test_what_only_the_nodes_have_is_no_reason_to_refuse_a_job(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This machine, like many that jobs are submitted from, has no GPU."""
    assert main(["submit", str(config), *FP8]) == 0
    assert main(["submit", str(config), *FP8, "--eval"]) == 0
    said = refusal(capsys, config, *FP8, "parallel.tp=4", "--nodes=2")
    assert "fp8.recipe=blockwise multiplies widths that divide by 16" in said


def test_a_site_file_that_is_missing_or_wrong_is_named(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Path("site.sh").absolute()
    site.write_text("TASKS_PER_NODE=many")
    said = refusal(capsys, config)
    assert said.endswith(f"{site}: TASKS_PER_NODE='many' must be a number of GPUs")
    site.write_text("no_such_program")
    assert f"{site}: " in (said := refusal(capsys, config)) and "no_such_program" in said
    site.unlink()
    assert f"{site}: no such file; copy " in refusal(capsys, config)


def test_what_sbatch_refuses_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n"
    )
    assert refusal(capsys, config).endswith("sbatch: error: invalid partition")


def test_a_stated_gpu_brings_the_plan_s_verdict_and_refuses_what_cannot_be_held(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["submit", str(config), "--gpu", "h200", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "\nplan: fits: at the most " in said and " of the 140.4 of an H200 SXM" in said
    small = replace(GPUS["h200"], memory_bytes=2**30)  # less than the libraries alone take
    monkeypatch.setitem(GPUS, "h200", small)
    assert main(words) == 0
    assert "\nplan: WARNING: phase " in capsys.readouterr().out
    monkeypatch.setitem(GPUS, "h200", replace(small, memory_bytes=2**10))
    assert "weights, gradients and optimizer alone take 0." in refusal(capsys, *words[1:])
    said = refusal(capsys, config, "--eval", "--gpu", "h200")
    assert "--gpu: a plan is of training" in said

"""`megatron-srpo eval` as a user meets it: one line of metrics, every response, refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_srpo.__main__ import main
from megatron_srpo.environment import unlaunched
from tests.e2e.small_run import write_small_run
from tests.e2e.test_command_line import refused


def evaluated(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`megatron-srpo eval ARGUMENTS`, alone or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), "-m", "megatron_srpo", "eval"]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=unlaunched(),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its training data is missing and its run folder holds a run: neither is evaluation's."""
    folder = tmp_path_factory.mktemp("evaluation")
    path = write_small_run(folder)
    (folder / "train.jsonl").unlink()
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("kept")
    return path


@pytest.fixture(scope="module")
def alone(config: Path) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """What one process says, and the responses that it writes."""
    out = config.parent / "alone"
    done = evaluated(config, "eval.num_samples=4", "--out", out, "eval.pass_at=[1,3]")
    assert done.returncode == 0, done.stderr
    return done, [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


def test_standard_output_is_one_line_of_json_and_the_run_folder_is_left_alone(
    config: Path, alone: tuple[subprocess.CompletedProcess[str], list[dict]]
) -> None:
    done, _ = alone
    (line,) = done.stdout.splitlines()
    assert json.loads(line).keys() == {
        "model",
        "eval/held_out/num_problems",
        "eval/held_out/num_responses",
        "eval/held_out/pass_at_1",
        "eval/held_out/pass_at_1_stderr",
        "eval/held_out/pass_at_3",
        "eval/held_out/pass_at_3_stderr",
        "eval/held_out/response_tokens_mean",
        "eval/held_out/truncated_rate",
        "eval/held_out/failure_rate",
    }
    header, row = done.stderr.splitlines()
    assert header.split()[:5] == ["set", "problems", "responses", "pass@1", "pass@3"]
    assert row.split()[:3] == ["held_out", "8", "32"]
    assert (config.parent / "run" / "metrics.jsonl").read_text() == "kept"
    assert [path.name for path in (config.parent / "run").iterdir()] == ["metrics.jsonl"]


def test_the_metrics_are_those_of_the_responses_that_were_written(
    config: Path, alone: tuple[subprocess.CompletedProcess[str], list[dict]]
) -> None:
    done, rows = alone
    problems = [json.loads(r) for r in (config.parent / "held_out.jsonl").read_text().splitlines()]
    assert [(r["prompt_id"], r["index"]) for r in rows] == [
        (problem["id"], index) for problem in problems for index in range(4)
    ]
    answers = {problem["id"]: problem["answer"] for problem in problems}
    for row in rows:
        is_right = row["text"].rpartition("\n")[2].strip() == answers[row["prompt_id"]]
        verdict = {"value": float(is_right), "correct": is_right, "failure": None}
        assert row["score"] == verdict | {"second_opinion": None}
    shares = [sum(r["score"]["correct"] for r in rows[i : i + 4]) / 4 for i in range(0, 32, 4)]
    mean = sum(shares) / 8
    error = math.sqrt(sum((share - mean) ** 2 for share in shares) / 7 / 8)
    metrics = json.loads(done.stdout)
    assert metrics["eval/held_out/pass_at_1"] == pytest.approx(mean)
    assert metrics["eval/held_out/pass_at_1_stderr"] == pytest.approx(error)
    lengths = [row["num_tokens"] for row in rows]
    assert metrics["eval/held_out/response_tokens_mean"] == pytest.approx(sum(lengths) / 32)
    cut = [row for row in rows if row["finish_reason"] == "length"]
    assert metrics["eval/held_out/truncated_rate"] == pytest.approx(len(cut) / 32)
    assert all(row["num_tokens"] == 24 for row in cut)


def test_two_processes_say_and_write_what_one_does(
    config: Path, alone: tuple[subprocess.CompletedProcess[str], list[dict]]
) -> None:
    out = config.parent / "two"
    options = (config, "eval.num_samples=4", "eval.pass_at=[1,3]", "--out", out)
    together = evaluated(*options, processes=2)
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone[0].stdout
    for name in ("responses.jsonl", "table.json", "table.csv", "table.tex"):
        assert (out / name).read_bytes() == (config.parent / "alone" / name).read_bytes()
    assert not list(config.parent.glob("*.partial"))


@pytest.mark.slow
def test_one_engine_of_two_processes_says_what_one_process_does(
    config: Path, alone: tuple[subprocess.CompletedProcess[str], list[dict]]
) -> None:
    options = (config, "eval.num_samples=4", "eval.pass_at=[1,3]", "rollout.tp=2")
    together = evaluated(*options, processes=2)
    assert together.returncode == 0, together.stderr
    assert json.loads(together.stdout) == pytest.approx(json.loads(alone[0].stdout))


@pytest.mark.slow
def test_more_processes_than_problems_still_evaluate_each_problem_once(config: Path) -> None:
    done = evaluated(config, "eval.num_prompts=1", processes=2)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["eval/held_out/num_problems"] == metrics["eval/held_out/num_responses"] == 1
    assert "eval/held_out/pass_at_1_stderr" not in metrics  # one problem has no spread


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "{folder}/run"), "run: exists already; name a new folder"),
        (("--out", "{folder}/config.yaml/out"), "config.yaml is no folder that can be written to"),
        (("--ckpt", "{folder}/run"), "run: no checkpoint, or one not written to its end"),
        (("--show", "9"), "--show 9: the largest set has 8 prompts"),
        (("model=nowhere",), "nowhere: not a Hugging Face model folder"),
        (("eval.sets.held_out.data=nowhere.jsonl",), "nowhere.jsonl: no such data file"),
        (("eval.pass_at=[2]",), "needs one k at least, none above num_samples=1"),
        (("eval.temperature=0",), "eval.temperature=0: Input should be greater than 0"),
        (("eval.sets.held_out.reward=bxed",), "bxed"),
        (("data.max_prompt_tokens=5",), "prompt 'held_out0' has 8 tokens"),
        (("rollout.kv_cache_bytes=1000",), "does not hold one sequence"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    config: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, output = refused("eval", config, *(w.format(folder=config.parent) for w in arguments))
    assert code == 2, output
    assert message in output and len(output.splitlines()) == 1


def test_a_prompt_is_shown_as_the_policy_sees_it(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "data.template='{prompt}{answer_format}'", "data.answer_format='1+'"
    assert main(["eval", str(config), *template, "--show", "2"]) == 0
    question = json.loads((config.parent / "held_out.jsonl").read_text().splitlines()[1])["prompt"]
    assert capsys.readouterr().out == f"--- held_out: held_out1, 10 tokens\n{question}1+\n"


def test_a_model_whose_weights_are_cut_off_is_refused(tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = evaluated(config)
    assert done.returncode == 2
    assert "model.safetensors: not readable as safetensors" in done.stderr

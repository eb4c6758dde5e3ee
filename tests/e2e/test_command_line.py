"""The command line as a user meets it: whole runs in processes of their own, and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_srpo.__main__ import main
from megatron_srpo.environment import unlaunched
from tests.e2e.small_run import write_small_run
from tests.launch import Command, start
from tests.tiny import VOCAB_SIZE

UNSTABLE = ("time/", "speed/", "memory/")


def refused(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and standard error of a command that ends before an engine starts: in here, since
    a process of its own would take longer to import than to refuse."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([str(argument) for argument in arguments])
    return code, said.getvalue()


def finish(process: subprocess.Popen[str] | Command) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def metrics(run: Path) -> list[dict[str, float]]:
    """All stable metrics, line by line."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(UNSTABLE)}
        for line in lines
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that was warm-started a little, and one run of SRPO from it."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_small_run(folder)
    warm_up = [sys.executable, "-m", "megatron_srpo", "sft", str(config), "sft.num_steps=60"]
    subprocess.run(warm_up, env=unlaunched(), check=True, timeout=300)
    finish(start("train", config, *from_warm_start(folder), f"run_dir={folder / 'first'}"))
    return folder


def from_warm_start(folder: Path) -> tuple[str, ...]:
    return (f"model={folder / 'sft' / 'hf'}", "algorithm.num_prompts=8", "optimizer.lr=1e-3")


def test_the_same_seed_gives_a_byte_equal_journal_and_equal_metrics(folder: Path) -> None:
    again = folder / "again"
    finish(start("train", folder / "config.yaml", *from_warm_start(folder), f"run_dir={again}"))
    names = sorted(path.name for path in (folder / "first" / "rollouts").iterdir())
    assert len(names) == 4  # two steps, each a .jsonl and a .npz
    for name in names:
        first, second = (folder / run / "rollouts" / name for run in ("first", "again"))
        assert first.read_bytes() == second.read_bytes(), name
    assert metrics(folder / "first") == metrics(again)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tp=2", "rollout.tp=2"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("parallel.pp=2",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_draw_and_learn_what_one_does(folder: Path, layout: tuple[str, ...]) -> None:
    run = folder / f"two_{len(layout)}"
    arguments = (folder / "config.yaml", *from_warm_start(folder), *layout, f"run_dir={run}")
    finish(start("train", *arguments, processes=2))
    alone, together = metrics(folder / "first"), metrics(run)
    assert len(alone) == len(together)
    for name, value in alone[0].items():  # later steps may draw otherwise after rounding
        tolerance = 2e-5 if name.startswith(("mismatch/", "sync/")) else 1e-6
        assert together[0][name] == pytest.approx(value, rel=1e-5, abs=tolerance), name


@pytest.mark.slow
def test_a_warm_start_over_tensor_parallel_processes_is_that_of_one(folder: Path) -> None:
    losses: list[list[float]] = []
    for processes, layout in ((1, ()), (2, ("parallel.tp=2",))):
        run = folder / f"sft_{processes}"
        finish(
            start("sft", folder / "config.yaml", f"sft.run_dir={run}", *layout, processes=processes)
        )
        losses.append([line["loss"] for line in metrics(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_replay_trains_on_the_journalled_rollouts_of_another_run(folder: Path) -> None:
    run = folder / "replayed"
    arguments = (folder / "config.yaml", *from_warm_start(folder), f"run_dir={run}")
    finish(start("train", *arguments, "--replay", folder / "first"))
    first, replayed = metrics(folder / "first"), metrics(run)
    assert [line["step"] for line in first] == [line["step"] for line in replayed]
    for name in ("loss", "grad_norm", "reward/mean", "tokens/trained"):
        assert [line.get(name) for line in first] == [line.get(name) for line in replayed], name
    assert (run / "rollouts" / "000001-00000-of-00001.npz").read_bytes() == (
        folder / "first" / "rollouts" / "000001-00000-of-00001.npz"
    ).read_bytes()


def test_importance_weights_of_rollouts_that_were_sampled_otherwise_are_refused(
    folder: Path,
) -> None:
    process = start(
        "train",
        folder / "config.yaml",
        *from_warm_start(folder),
        f"run_dir={folder / 'weighted'}",
        "loss.importance=token_truncate",
        "rollout.temperature=0.9",
        "--replay",
        folder / "first",
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and len(output.strip().splitlines()) == 1, output
    assert "first: was sampled at temperature 1 and top_p 1: loss.importance=" in output


def test_the_exported_folder_is_the_trained_policy(folder: Path) -> None:
    before = Qwen2ForCausalLM.from_pretrained(folder / "sft" / "hf").state_dict()
    after = Qwen2ForCausalLM.from_pretrained(folder / "first" / "hf").state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)
    assert {path.name for path in (folder / "first").iterdir()} == {
        "config.yaml",
        "hf",
        "log.txt",
        "metrics.jsonl",
        "report.html",
        "rollouts",
    }
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= {
        path.name for path in (folder / "first" / "hf").iterdir()
    }


PARITY = """
import os
from megatron_srpo.types import Score

def parity(prompt, response):
    if response.endswith("7") and prompt.id == "held_out7":
        os._exit(7)
    is_odd = sum(map(int, filter(str.isdigit, response))) % 2 == 1
    failure = "ends with a seven" if response.endswith("7") else None
    return Score(value=float(is_odd), correct=is_odd, failure=failure)
"""


def test_evaluating_the_exported_folder_or_the_checkpoint_says_what_the_run_s_last_line_says(
    folder: Path,
) -> None:
    (folder / "parity.py").write_text(PARITY)
    run = folder / "evaluated"
    shared = (
        "eval.num_samples=8",
        "eval.pass_at=[1,2]",
        "eval.greedy=true",
        "eval.num_seeds=2",
        f"reward={folder}/parity.py:parity",
    )
    arguments = (folder / "config.yaml", *from_warm_start(folder), *shared)
    finish(start("train", *arguments, "num_steps=1", f"run_dir={run}", "checkpoint.every=1"))
    results = folder / "of_folder", folder / "of_checkpoint"
    (checkpoint,) = (run / "checkpoints").iterdir()
    asked = ("eval", *arguments)
    lines = finish(start(*asked, f"model={run / 'hf'}", "--out", results[0])).splitlines()
    (said,) = (json.loads(line) for line in lines if line.startswith("{"))
    finish(start(*asked, "model=nowhere", "--ckpt", checkpoint, "--out", results[1]))
    assert [*(run / "checkpoints").iterdir()] == [checkpoint]
    for name in ("responses.jsonl", "table.json"):
        assert (results[0] / name).read_bytes() == (results[1] / name).read_bytes()
    compared = finish(start("compare", *results))
    rows = [line.split() for line in compared.splitlines()[2:]]
    assert [row[:-5] for row in rows] == [["held_out", "greedy", "7", "0"], ["sampled", "8", "0"]]
    assert all(row[-5] == row[-4] and row[-3:] == ["0.0000"] * 3 for row in rows)
    before, after = (
        {name.rpartition("/")[2]: v for name, v in line.items() if name.startswith("eval/")}
        for line in metrics(run)
    )
    assert after == {name: said[f"eval/held_out/{name}"] for name in after}
    assert before.keys() == after.keys() and before != after
    assert 0 < after["pass_at_1"] < after["pass_at_2"] < 1
    assert after["failure_rate"] > 0 and "greedy" in after
    log = (run / "log.txt").read_text()
    assert "the reward of prompt 'train0' failed: ends with a seven" in log
    died = "the reward of prompt 'held_out7' failed: its process ended with exit code 7, twice"
    assert died in log and f"held_out: {died}" in lines


def test_wandb_offline_and_tensorboard_are_written_when_asked_for(folder: Path) -> None:
    run = folder / "logged"
    overrides = (f"run_dir={run}", "num_steps=1", "log.wandb=true", "log.tensorboard=true")
    finish(start("train", folder / "config.yaml", *from_warm_start(folder), *overrides))
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert list(run.glob("tensorboard/events.*"))


def break_model_path(folder: Path) -> str:
    return "model=nowhere"


def break_data_path(folder: Path) -> str:
    return "data.train=nowhere.jsonl"


def drop_an_answer(folder: Path) -> str:
    rows = (folder / "train.jsonl").read_text().splitlines()
    rows[2] = json.dumps({"id": "x", "prompt": "1+1\n"})
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return "num_steps=1"


def double_an_id(folder: Path) -> str:
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*rows, rows[0]]) + "\n")
    return "num_steps=1"


def swap_the_tokenizer(folder: Path) -> str:
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace(f'"vocab_size": {VOCAB_SIZE}', '"vocab_size": 12'))
    return "num_steps=1"


def cut_the_weights(folder: Path) -> str:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return "num_steps=1"


def set_in_row(**columns: object) -> Callable[[Path], str]:
    """The third training row gets these columns."""

    def breakage(folder: Path) -> str:
        rows = (folder / "train.jsonl").read_text().splitlines()
        rows[2] = json.dumps(json.loads(rows[2]) | columns)
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
        return "num_steps=1"

    return breakage


def spoil_the_encoding(folder: Path) -> str:
    with (folder / "config.yaml").open("ab") as file:
        file.write(b"# \xff\xfe\n")
    return "num_steps=1"


def set_in_model(key: str, value: object) -> Callable[[Path], str]:
    """config.json of the model gets this value."""

    def breakage(folder: Path) -> str:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        return "num_steps=1"

    return breakage


def another_architecture(folder: Path) -> str:
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace('"qwen2"', '"gpt2"'))
    return "num_steps=1"


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (break_model_path, "nowhere: not a Hugging Face model folder"),
        (break_data_path, "nowhere.jsonl: no such data file"),
        (drop_an_answer, "train.jsonl: row 3 has no 'answer'"),
        (double_an_id, "train.jsonl: row 25 has the id 'train0' of an earlier row"),
        (swap_the_tokenizer, "the tokenizer does not belong to the model"),
        (cut_the_weights, "model.safetensors: not readable as safetensors"),
        (set_in_model("num_attention_heads", "4"), "num_attention_heads must be a number, not '4'"),
        (another_architecture, "model_type 'gpt2' is not supported (supported: llama,"),
        (lambda folder: "data.max_prompt_tokens=5", "prompt 'train0' has 8 tokens"),
        (
            lambda folder: "algorithm.num_rollouts=4",
            "num_rollouts=4 with split=1x4 has 0 base rollouts",
        ),
        (lambda folder: "algorithm.num_prompts=0", "algorithm.num_prompts=0: Input should be"),
        (lambda folder: "algorithm.num_prompts=25", "24 prompts are fewer than a step's"),
        (lambda folder: "rollout.temprature=1", "did you mean 'rollout.temperature'?"),
        (lambda folder: "localize.template={who}", "localize.template"),
        (lambda folder: "reward=vibes", "reward=vibes: must be one of"),
        (set_in_row(prompt=7), "row 3: prompt must be a text or chat messages"),
        (set_in_row(prompt=[{"role": "user"}]), "row 3: prompt must be a text or chat messages"),
        (
            set_in_row(prompt=[{"role": "user", "content": "1+1"}]),
            "train.jsonl: row 3: chat messages were given, but the tokenizer has no chat template",
        ),
        (set_in_row(answer=["3"]), "row 3: answer must be a text or a number"),
        (set_in_row(solution="123"), "row 3: solution must be a list of texts"),
        (spoil_the_encoding, "config.yaml: 'utf-8' codec can't decode"),
        (lambda folder: "--replay=nowhere", "nowhere/rollouts: no rollouts of step 0"),
        (lambda folder: f"run_dir={folder}/config.yaml/run", "is no folder that can be written to"),
        (
            lambda folder: "rollout.max_model_len=300",
            "rollout.max_model_len=300 is more than the model's max_position_embeddings=256",
        ),
        (lambda folder: "rollout.kv_cache_bytes=1000", "does not hold one sequence"),
    ],
)
def test_bad_input_gets_one_line_exit_code_2_and_leaves_nothing(
    tmp_path: Path, breakage: Callable[[Path], str], message: str
) -> None:
    config = write_small_run(tmp_path)
    code, output = refused("train", config, breakage(tmp_path))
    assert code == 2, output
    assert message in output
    assert len(output.strip().splitlines()) == 1, output
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_does_not_divide_the_prompts_is_refused(tmp_path: Path) -> None:
    process = start("train", write_small_run(tmp_path), "algorithm.num_prompts=5", processes=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (
        "algorithm.num_prompts=5 does not divide over 2 rollout engines x loss.updates_per_batch=1"
        in output
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_finished_run_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first", tmp_path / "kept")
    command = ("train", folder / "config.yaml", *from_warm_start(folder))
    code, output = refused(*command, f"run_dir={tmp_path / 'kept'}")
    assert code == 0 and "this run is finished; for another one name a new folder" in output
    code, output = refused(*command, f"run_dir={tmp_path / 'kept'}", "seed=1")
    assert code == 2 and "holds a finished run with seed=0, not 1" in output
    for path in (folder / "first").rglob("*"):
        if path.is_file():
            kept = tmp_path / "kept" / path.relative_to(folder / "first")
            assert kept.read_bytes() == path.read_bytes()

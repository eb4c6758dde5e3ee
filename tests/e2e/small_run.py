"""A run small enough for tests: real engines, a random policy, sums of digits as its task."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from tests.tiny import write_policy


def write_small_run(folder: Path, **changes: object) -> Path:
    """Policy, data and config; returns the config's path. `changes` are top-level keys."""
    write_policy(folder / "model", seed=0)
    rng = random.Random(0)
    for name, num_rows in (("train", 24), ("held_out", 8)):
        rows = [_problem(f"{name}{index}", rng) for index in range(num_rows)]
        _write_rows(folder / f"{name}.jsonl", rows)
    solved = [_problem(str(index), rng) for index in range(64)]
    demonstrations = [
        {"prompt": row["prompt"], "response": "\n".join(row["solution"])} for row in solved
    ]
    _write_rows(folder / "demonstrations.jsonl", demonstrations)
    config = {
        "run_dir": str(folder / "run"),
        "model": str(folder / "model"),
        "num_steps": 2,
        "reward": "last_line",
        "max_logprob_diff": 5e-5,
        "data": {
            "train": str(folder / "train.jsonl"),
            "max_prompt_tokens": 16,
        },
        "algorithm": {"num_prompts": 4},
        "thoughts": {"delimiter": "\n", "max_tokens": 6},
        "localize": {"template": "{prompt}{response}?", "parser": "verdicts", "max_tokens": 12},
        "rollout": {"max_response_tokens": 24, "max_model_len": 128},
        "optimizer": {"lr": 3e-4},
        "eval": {
            "sets": {"held_out": {"data": str(folder / "held_out.jsonl")}},
            "every": 2,
            "num_prompts": 8,
        },
        "sft": {
            "run_dir": str(folder / "sft"),
            "model": str(folder / "model"),
            "data": str(folder / "demonstrations.jsonl"),
            "num_steps": 3,
            "batch_size": 8,
            "optimizer": {"lr": 1e-3},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def small_config(folder: Path, *overrides: str) -> Config:
    return load_config(write_small_run(folder), overrides)


def _problem(id: str, rng: random.Random) -> dict:
    digits = [rng.randrange(10) for _ in range(4)]
    solution = [str(sum(digits[: count + 2]) % 10) for count in range(3)]
    prompt = "+".join(map(str, digits)) + "\n"
    return {"id": id, "prompt": prompt, "answer": solution[-1], "solution": solution}


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

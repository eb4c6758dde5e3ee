"""Saving and loading a run's state: seconds, bytes, and how long training waits for it.

    python tools/bench_checkpoint.py [--processes 1 2] [--hidden 768] [--layers 8] [--repeat 3]

A made-up policy with its optimizer, saved by `engines/megatron/checkpoint.py`, each time into a new
folder, data parallel. Prints one JSON object; seconds are medians, of the slower process. The first
save, which starts Megatron's results process, is not counted and stands beside the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_srpo.environment import set_environment

VOCAB_SIZE = 8192
HEAD_SIZE = 64
KINDS = ("synchronous", "asynchronous")


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and bytes of checkpoints.")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is None:
        print(json.dumps(launch_all(arguments), indent=1))
    else:
        work(arguments.work, arguments.repeat)


def launch_all(arguments: argparse.Namespace) -> dict[str, Any]:
    set_environment()
    found: dict[str, Any] = {}
    for num in arguments.processes:
        with tempfile.TemporaryDirectory() as scratch:
            num_parameters = write_policy(
                Path(scratch) / "policy", hidden=arguments.hidden, layers=arguments.layers
            )
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(num), __file__]
            command += ["--repeat", str(arguments.repeat), "--work", scratch]
            subprocess.run(command, check=True, stdout=sys.stderr)
            shares = [json.loads(file.read_text()) for file in Path(scratch).glob("*.json")]
        found[f"{num} processes"] = {
            name: max(share[name] for share in shares) for name in shares[0]
        }
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "parameters": num_parameters,
        "found": found,
    }


def write_policy(folder: Path, *, hidden: int, layers: int) -> int:
    """A random Qwen2; returns the number of its parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE // 2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def work(scratch: Path, repeat: int) -> None:
    """One process's share."""
    set_environment()
    import torch

    from megatron_srpo.config_sections import LossConfig, OptimizerConfig
    from megatron_srpo.engines.megatron.checkpoint import CheckpointWriter, load_checkpoint
    from megatron_srpo.engines.megatron.learner import MegatronLearner
    from megatron_srpo.engines.megatron.mesh import build_mesh, destroy_mesh

    mesh = build_mesh()

    def build() -> MegatronLearner:
        return MegatronLearner(
            scratch / "policy",
            mesh,
            dtype=torch.float32,
            temperature=1.0,
            optimizer=OptimizerConfig(),
            loss=LossConfig(),
            num_steps=1,
        )

    learner = build()
    writers = {
        kind: CheckpointWriter(learner, asynchronous=kind == "asynchronous", gather=mesh.gather)
        for kind in KINDS
    }

    def save(kind: str, name: str) -> tuple[float, float]:
        """(seconds that training waits, seconds until the checkpoint is on disk)"""
        folder = scratch / name
        if mesh.rank == 0:
            folder.mkdir()
        mesh.gather(None)
        waits = seconds(lambda: writers[kind].begin(folder))
        return waits, waits + seconds(lambda: writers[kind].is_done(wait=True))

    found = {"first_save_s": save("synchronous", "first")[0]}
    for kind in KINDS:
        times = [save(kind, f"{kind}{index}") for index in range(repeat)]
        found[f"{kind}_waits_s"], found[f"{kind}_on_disk_s"] = (
            statistics.median(each) for each in zip(*times, strict=True)
        )
    found["load_s"] = statistics.median(
        seconds(lambda: load_checkpoint(learner, scratch / "first")) for _ in range(repeat)
    )
    files = (scratch / "first").rglob("*")
    found["bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    mesh.gather(None)
    (scratch / f"{mesh.rank}.json").write_text(json.dumps(found))
    destroy_mesh()


def seconds(stage: Callable[[], object]) -> float:
    began = time.perf_counter()
    stage()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

"""The stages of a step that are ours alone: time and memory against the number of rollouts.

    python tools/bench_stages.py [--rollouts 1024 2048 4096] [--tokens 8192] [--repeat 3]

Thoughts (incremental decoding by a byte-pair tokenizer), journal, grouping and credit, metrics,
packing, exchange between two processes: measured on made-up rollouts, each size in two fresh
processes. Prints one JSON object: for each size, seconds (medians, of the slower process) and GiB
per process (`beyond_rollouts_gib`: the most that the stages held besides the rollouts).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.environment import set_environment

NUM_THOUGHTS = 32
"""In each rollout."""
NUM_PROCESSES = 2
VOCAB_SIZE = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the stages that are ours.")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is None:
        print(json.dumps(launch_all(arguments), indent=1))
    else:
        (num_rollouts,) = arguments.rollouts
        work(num_rollouts, arguments.tokens, arguments.repeat, Path(arguments.work))


def launch_all(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for num_rollouts in arguments.rollouts:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(NUM_PROCESSES), __file__]
            command += ["--rollouts", str(num_rollouts), "--tokens", str(arguments.tokens)]
            command += ["--repeat", str(arguments.repeat), "--work", scratch]
            subprocess.run(command, check=True, stdout=sys.stderr)
            shares = [json.loads(file.read_text()) for file in Path(scratch).glob("*.json")]
        sizes[str(num_rollouts)] = {
            stage: max(share[stage] for share in shares) for stage in shares[0]
        }
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {NUM_PROCESSES} processes",
        "tokens_per_rollout": arguments.tokens,
        "rollouts": sizes,
    }


def work(num_rollouts: int, num_tokens: int, repeat: int, scratch: Path) -> None:
    """One process's share, timed stage by stage."""
    set_environment()
    from megatron_srpo.advantages import GroupNormalized
    from megatron_srpo.algorithm import to_samples
    from megatron_srpo.batching import pack, plan_micro_batches
    from megatron_srpo.engines.megatron.mesh import build_mesh, destroy_mesh
    from megatron_srpo.exchange import exchange
    from megatron_srpo.journal import Journal, read_step
    from megatron_srpo.metrics import rollout_sums
    from megatron_srpo.pack_layout import PackLayout
    from megatron_srpo.thoughts import split_thoughts

    mesh = build_mesh()
    cfg = made_up_config(num_tokens)
    groups = made_up_groups(num_rollouts // mesh.world_size, num_tokens, mesh.rank)
    folder = scratch / "rollouts"
    folder.mkdir(exist_ok=True)
    journal = Journal(folder=folder, replica=mesh.rank, num_replicas=mesh.world_size)
    before = peak_gib()
    samples = to_samples(groups, GroupNormalized(cfg), cfg)
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    layout = PackLayout.on(mesh, max_tokens=2 * num_tokens)
    tokenizer = BytePairs()
    stages: dict[str, Callable[[], object]] = {
        "thoughts": lambda: [
            split_thoughts(rollout.token_ids, tokenizer, cfg.thoughts)
            for group in groups
            for rollout in group.rollouts
        ],
        "group_and_credit": lambda: to_samples(groups, GroupNormalized(cfg), cfg),
        "metrics": lambda: rollout_sums(groups, cfg),
        "journal_write": lambda: journal.write(0, groups),
        "journal_read": lambda: read_step(folder, 0),
        "plan": lambda: plan_micro_batches(lengths, layout),
        "pack": lambda: [pack(samples[i : i + 2], layout) for i in range(0, len(samples), 2)],
        "exchange": lambda: exchange(samples, mesh, layout=layout),
    }
    found: dict[str, float] = {}
    for name, stage in stages.items():
        mesh.gather(None)
        found[f"{name}_s"] = statistics.median(seconds(stage) for _ in range(repeat))
    found["rollouts_gib"] = before
    found["beyond_rollouts_gib"] = peak_gib() - before
    found["journal_gib"] = sum(file.stat().st_size for file in folder.iterdir()) / 2**30
    (scratch / f"{mesh.rank}.json").write_text(json.dumps(found))
    destroy_mesh()


def seconds(stage: Callable[[], object]) -> float:
    began = time.perf_counter()
    stage()
    return time.perf_counter() - began


def peak_gib() -> float:
    """Largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def made_up_config(num_tokens: int):
    from megatron_srpo.config import Config

    return Config.model_validate(
        {
            "run_dir": "runs/none",
            "model": "none",
            "data": {"train": "none.jsonl"},
            "eval": {"sets": {"held_out": {"data": "none.jsonl"}}},
            "rollout": {"max_response_tokens": num_tokens, "max_model_len": 4 * num_tokens},
        }
    )


class BytePairs:
    """A byte-pair tokenizer of a few thousand made-up words."""

    eos_token_id = 0

    def __init__(self) -> None:
        import random

        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(3000)]
        texts = [" ".join(rng.choices(words, k=100)) for _ in range(500)]
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
        self._tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False)  # type: ignore[call-arg]
        self._tokenizer.train_from_iterator(texts, trainer)

    def encode(self, text: str) -> Any:
        raise NotImplementedError("rollouts are made up in tokens")

    def encode_chat(self, messages: Any) -> Any:
        raise NotImplementedError("rollouts are made up in tokens")

    def pieces(self, token_ids: Any) -> list[str]:
        """As `tokenizer.HFTokenizer` does it."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return [stream.step(self._tokenizer, int(token)) or "" for token in token_ids]


def made_up_groups(num_rollouts: int, num_tokens: int, rank: int) -> Sequence[Any]:
    """Four base rollouts and four suffixes a prompt, half of each correct."""
    import numpy as np

    from megatron_srpo.types import Group, Prompt, Reset, Rollout, Score, Thought

    rng = np.random.default_rng(rank)
    size = num_tokens // NUM_THOUGHTS

    def thoughts(id: str) -> tuple[Thought, ...]:
        """Four characters a token, and texts of their own."""
        return tuple(
            Thought(text=f"{id} {index} ".ljust(4 * size, "."), start=index * size)
            for index in range(NUM_THOUGHTS)
        )

    def rollout(prompt: Prompt, stage: Any, index: int) -> Rollout:
        id = f"0/{prompt.id}/{stage}/{index}"
        return Rollout(
            id=id,
            prompt=prompt,
            stage=stage,
            token_ids=rng.integers(0, VOCAB_SIZE // 2, num_tokens).astype(np.int32),
            logprobs=-rng.random(num_tokens).astype(np.float32),
            num_copied=size * 8 if stage == "suffix" else 0,
            seed_id=f"0/{prompt.id}/base/0" if stage == "suffix" else None,
            thoughts=thoughts(id),
            score=Score(value=float(index % 2), correct=bool(index % 2)),
            finish_reason="stop",
            num_cached_tokens=0,
            weight_version=0,
        )

    groups: list[Group] = []
    for number in range(num_rollouts // 8):
        ids = np.arange(256, dtype=np.int32)
        asked = Prompt(id=f"{rank}-{number}", text="?", token_ids=ids, answer="1")
        reset = Reset(seed_id=f"0/{asked.id}/base/0", thought=8, cause="named")
        base, suffix = (
            tuple(rollout(asked, stage, index) for index in range(4))
            for stage in ("base", "suffix")
        )
        groups += [
            Group(prompt=asked, rollouts=base),
            Group(prompt=asked, rollouts=suffix, resets=(reset,)),
        ]
    return groups


if __name__ == "__main__":
    main()

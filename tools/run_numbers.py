"""The numbers of one run, from its folder: exactness, resets, cost.

    python tools/run_numbers.py RUN

Prints one JSON object. `export_logits_abs_max` loads the exported folder into transformers and
into the trainer's Megatron model (fp32) and compares logits on the last journalled step.
"""

# The environment must be set before torch is imported.
# ruff: noqa: E402
from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from megatron_srpo.environment import be_one_process_unless_launched, set_environment

set_environment()
be_one_process_unless_launched()

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_srpo.engines.megatron.forward import Forward
from megatron_srpo.engines.megatron.mesh import build_mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.names import heads_of
from megatron_srpo.engines.megatron.weights import load_hf
from megatron_srpo.journal import read_step
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import Tokens


def main(root: Path) -> None:
    folder = RunFolder(root)
    lines = [json.loads(line) for line in folder.metrics.read_text("utf-8").splitlines()]
    steps = [line for line in lines if "time/step_s" in line]
    last = len(steps) - 1
    sequences = [
        np.concatenate([group.prompt.token_ids, rollout.token_ids])
        for group in read_step(folder.rollouts, last)
        for rollout in group.rollouts
    ]
    numbers = {
        "steps": len(steps),
        "pass_at_1": [v for line in lines for k, v in line.items() if k.endswith("pass_at_1")],
        "export_logits_abs_max": export_difference(folder.hf, sequences),
        **{name: max(measured(steps, name)) for name in LARGEST},
        **{name: statistics.fmean(measured(steps, name)) for name in MEANS},
        "suffixes_with_a_prefix": suffixes_with_a_prefix(folder, len(steps)),
        **phase_shares(steps),
    }
    print(json.dumps(numbers, indent=1))


LARGEST = ("mismatch/logprob_abs_max", "sync/probe_logprob_abs_max", "memory/peak_gib")
MEANS = (
    "thought/num_mean",
    "thought/cut_rate",
    "reset/depth_frac_mean",
    "localize/exact_rate",
    "localize/clean_rate",
    "localize/parse_failed_rate",
    "group/zero_signal_rate",
    "tokens/base",
    "tokens/suffix",
    "tokens/localize",
    "tokens/prefix_cached",
    "reset/prefix_cached_tokens",
)


def measured(steps: list[dict[str, float]], name: str) -> list[float]:
    """The metric's values, of the steps that have it."""
    return [line[name] for line in steps if name in line]


def export_difference(hf: Path, sequences: list[Tokens]) -> float:
    """Largest |logit| difference, each side in fp32."""
    mesh = build_mesh()
    chunks = build_chunks(hf, mesh, torch.float32)
    load_hf(chunks, hf, mesh)
    forward = Forward(chunks, mesh, heads_of(hf))
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    largest = 0.0
    for tokens, ours in zip(sequences, forward.logits(sequences), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor(tokens[:-1], dtype=torch.long)[None]).logits[0]
        largest = max(largest, float((ours - theirs).abs().max()))
    return largest


def suffixes_with_a_prefix(folder: RunFolder, num_steps: int) -> float:
    suffixes = [
        rollout.num_copied > 0
        for step in range(num_steps)
        for group in read_step(folder.rollouts, step)
        for rollout in group.rollouts
        if rollout.stage == "suffix"
    ]
    return statistics.fmean(suffixes) if suffixes else 0.0


def phase_shares(steps: list[dict[str, float]]) -> dict[str, float]:
    """Mean seconds of a step, and the share of each phase, evaluation left out."""
    names = {name for line in steps for name in line if name.startswith("time/")}
    names -= {"time/step_s", "time/eval_s"}
    seconds = {name: sum(line.get(name, 0.0) for line in steps) for name in sorted(names)}
    total = sum(seconds.values())
    work = {f"time/{phase}_s" for phase in ("generate", "localize", "suffix", "reward")}
    work |= {"time/train_s", "time/sync_s"}
    shares = {f"share/{name[5:-2]}": value / total for name, value in seconds.items()}
    rest = sum(value for name, value in seconds.items() if name not in work) / total
    return {"step_s": total / len(steps), **shares, "share/not_work": rest}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

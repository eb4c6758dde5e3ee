"""How far is each family on each layout from transformers in float64?

python -m tests.parallel.parity > benchmarks/parity.md
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_srpo.environment import set_environment
from megatron_srpo.types import Sample
from tests.parallel import jobs, reference
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, random_samples, write_policy

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "PP2xVPP2": (2, {"pp": 2, "vpp": 2}),
    "CP2": (2, {"cp": 2}),
    "DP2": (2, {}),
    "DP2, overlapped": (2, {"overlap": True}),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}),
    "TP2xCP2": (4, {"tp": 2, "cp": 2}),
    "PP2xVPP2xDP2, overlapped": (4, {"pp": 2, "vpp": 2, "overlap": True}),
    "TP2xDP2, all recomputed": (4, {"tp": 2, "recompute": "full"}),
    "CP2xDP2, attention recomputed": (4, {"cp": 2, "recompute": "attention"}),
    "EP2": (2, {"ep": 2}),
    "CP2xEP2": (2, {"cp": 2, "ep": 2}),
    "TP2xEP2": (4, {"tp": 2, "ep": 2}),
    "PP2xEP2": (4, {"pp": 2, "ep": 2}),
}
"""Processes, and fields of `ParallelConfig`; tensor parallel is sequence parallel too."""
TIED = ("qwen2", "qwen3")
"""The others have a head of their own."""


def fits(family: str, layout: str) -> bool:
    """Only a model with experts can share them."""
    return family == "qwen3_moe" or "ep" not in LAYOUTS[layout][1]


def samples() -> list[Sample]:
    return random_samples(jobs.NUM_SAMPLES, seed=1)


class References:
    """A tiny policy of each family, and what is right of it; each is computed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.policy: Callable[[str], Path] = cache(self._policy)
        self.gradient = cache(lambda f: reference.loss_and_gradients(self.policy(f), samples()))
        self.three_steps = cache(lambda f: reference.three_adamw_steps(self.policy(f)))
        self._logits = cache(lambda f: reference.logits(self.policy(f), jobs.sequences()))

    def _policy(self, family: str) -> Path:
        tied = family in TIED
        return write_policy(self._folder / family, seed=7, family=family, tied=tied, num_layers=4)

    def logit_difference(self, family: str, ranks: Sequence[dict[str, Any]]) -> float:
        """Over all last stages."""
        last = [rank["logits"] for rank in ranks if rank["logits"]]
        assert last
        return max(
            float((found - right).abs().max())
            for logits in last
            for found, right in zip(logits, self._logits(family), strict=True)
        )

    def row(self, family: str, ranks: Sequence[dict[str, Any]]) -> list[float]:
        """logits, loss, gradient / max|g|, gradient norms (relative), parameters"""
        ((stats, gradient),) = ranks[0]["gradients"].values()
        return [
            self.logit_difference(family, ranks),
            *reference.gradient_difference(stats, gradient, self.gradient(family)),
            *reference.steps_difference(*ranks[0]["steps"], self.three_steps(family)),
        ]


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(HEADER.format(commit=commit, date=date.today(), machine=platform.machine()))
    pool = Pool()
    with TemporaryDirectory() as folder:
        references = References(Path(folder))
        for family in FAMILIES:
            for layout, (num, parallel) in LAYOUTS.items():
                if fits(family, layout):
                    policy = references.policy(family)
                    ranks = pool.run(num, jobs.on_layout, policy, (100,), **parallel)
                    numbers = " | ".join(f"{x:.1e}" for x in references.row(family, ranks))
                    print(f"| {family} | {layout} | {numbers} |", flush=True)
    pool.close()


HEADER = """# Parity: every family on every layout, against transformers in float64

`python -m tests.parallel.parity > benchmarks/parity.md`, commit {commit}, {date}, {machine}, CPU,
fp32.

Policies of four layers with random weights, saved by transformers: hidden size, heads x head size
and intermediate size differ where the family allows, 37 tokens (no layout divides them), qwen2 and
qwen3 with a tied head, sequences of 11 to 59 tokens, longer than the sliding window (8) and than
the original length of YaRN and llama3 scaling (16). The reference runs every sequence alone,
unpacked, in one process. Columns: largest difference of a logit; of the loss; of a gradient, as a
share of the largest one; of the gradient norms of three AdamW steps (eps 1e-4), relative; of a
parameter after them. Bounds: 1e-5, 1e-6, 5e-6, 5e-6, 1e-5.

| family | layout | logits | loss | gradient | gradient norm | parameters |
|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    set_environment()
    sys.exit(main())

"""Where methods are compared: task, warm-started policy, reward, and what a run may spend.

    regime -> data and warm start on disk, overrides of examples/chain_arithmetic_cpu.yaml

h8 is the demo task itself; `examples/chain_regimes.py` says what the others are.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples/chain_arithmetic_cpu.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """One task."""

    name: str
    title: str
    budget: int
    """Tokens that a run may generate, of all kinds, evaluations left out."""
    num_prompts: int
    """A step."""
    every: int
    """Steps between evaluations: some twelve of GRPO's in a budget."""
    thresholds: tuple[float, float]
    """Held-out pass rates: how many tokens until there?"""
    settings: tuple[str, ...] = ()
    """What else differs from the demo's config."""

    @property
    def data(self) -> Path:
        """Its folder, relative to the repository."""
        return Path("data") / self._place

    @property
    def warm_start(self) -> Path:
        """The run that made the policy, relative to the repository."""
        return Path("runs") / (f"{DEMO}_warm_start" if self.name == "h8" else self._place)

    @property
    def _place(self) -> str:
        return DEMO if self.name == "h8" else f"chain_regimes/{self.name}"

    @property
    def overrides(self) -> list[str]:
        """Of the demo's config; nothing of a method."""
        data = self.data
        return [
            f"data.train={data}/train.jsonl",
            f"eval.sets.held_out.data={data}/eval.jsonl",
            f"eval.every={self.every}",
            f"retention.data={data}/localize.jsonl",
            f"sft.data={data}/sft.jsonl",
            f"sft.model={data}/model",
            f"sft.run_dir={self.warm_start}",
            f"algorithm.num_prompts={self.num_prompts}",
            *self.settings,
        ]

    def prepare(self) -> None:
        """Writes data and warm start, if they are not there: two minutes."""
        script = ["chain_arithmetic.py"] if self.name == "h8" else ["chain_regimes.py", self.name]
        if not (ROOT / self.data / "DONE").exists():
            _run(f"examples/{script[0]}", *script[1:], str(self.data))
        if not (ROOT / self.warm_start / "hf/config.json").exists():
            _run("-m", "megatron_srpo", "sft", str(CONFIG), *self.overrides)


def _run(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


DEMO = "chain_arithmetic"
STRICT = "reward=examples/chain_reward.py:all_thoughts"
FILLED = (
    "data.max_prompt_tokens=48",
    "rollout.max_response_tokens=48",
    "rollout.max_model_len=192",
    "localize.max_tokens=48",
    "thoughts.max_tokens=8",
    "sft.num_steps=1280",  # what must be looked up is two and a half times as far away
)
REGIMES = {
    regime.name: regime
    for regime in (
        Regime(
            name="h8",
            title="hard facts everywhere, the answer alone is rewarded (the demo task)",
            budget=90_000,
            num_prompts=16,
            every=3,
            thresholds=(0.5, 0.7),
        ),
        Regime(
            name="u8",
            title="every fact hard, all thoughts must be right: sparse reward",
            budget=40_000,
            num_prompts=4,
            every=6,
            thresholds=(0.2, 0.5),
            settings=(STRICT,),
        ),
        Regime(
            name="m8",
            title="easy and hopeless problems mixed, all thoughts must be right",
            budget=50_000,
            num_prompts=5,
            every=6,
            thresholds=(0.5, 0.7),
            settings=(STRICT,),
        ),
        Regime(
            name="k8",
            title="few hard facts, some very hard, all thoughts must be right",
            budget=60_000,
            num_prompts=8,
            every=4,
            thresholds=(0.5, 0.7),
            settings=(STRICT,),
        ),
        Regime(
            name="f8",
            title="late mistakes and filler, all thoughts must be right (held out: nothing was "
            "chosen on it but its learning rate)",
            budget=60_000,
            num_prompts=4,
            every=4,
            thresholds=(0.5, 0.7),
            settings=(STRICT, *FILLED),
        ),
    )
}

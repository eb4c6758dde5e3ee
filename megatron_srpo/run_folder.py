"""What a run leaves:  config.yaml  metrics.jsonl  log.txt  rollouts/  hf/  (wandb/ tensorboard/)"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_srpo.config import Config
from megatron_srpo.config_file import dump_config
from megatron_srpo.types import InputError


@dataclass(frozen=True, slots=True)
class RunFolder:
    root: Path

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def hf(self) -> Path:
        """The trained policy in Hugging Face format."""
        return self.root / "hf"

    def check_free(self) -> None:
        """Raises `InputError` if another run lives here, or something that is no folder."""
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"run_dir={self.root}: exists and is not a folder")
        if self.root.is_dir() and any(self.root.iterdir()):
            raise InputError(
                f"run_dir={self.root}: already holds another run; name a new folder "
                "(run_dir=PATH) or remove this one"
            )
        parent = next(path for path in self.root.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"run_dir={self.root}: {parent} is no folder that can be written to")

    def create(self, cfg: Config) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "config.yaml").write_text(dump_config(cfg), "utf-8")

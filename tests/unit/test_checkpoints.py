"""What a run writes into a checkpoint besides its learner says what the learner has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from megatron_srpo import checkpoints
from megatron_srpo.config_sections import ParallelConfig


def test_a_runs_checkpoint_states_the_runs_dtype_whatever_the_model_had(tmp_path: Path):
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"size": 1, "dtype": "float32"}))
    cfg: Any = SimpleNamespace(
        model=model, dtype="bfloat16", checkpoint=SimpleNamespace(asynchronous=False)
    )
    alone: Any = SimpleNamespace(
        rank=0, world_size=1, gather=lambda one: [one], parallel=ParallelConfig()
    )
    data: Any = SimpleNamespace(state_dict=dict)
    learner: Any = None
    with patch.object(checkpoints, "CheckpointWriter"):
        of_run = checkpoints.Checkpoints(
            tmp_path / "run", cfg, learner=learner, data=data, mesh=alone
        )
        of_run._begin()
    written = tmp_path / "run" / "000000.partial" / "hf" / "config.json"
    assert json.loads(written.read_text()) == {"size": 1, "dtype": "bfloat16"}

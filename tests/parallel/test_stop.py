"""An update that is stopped between micro-batches has changed nothing, on any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_srpo.engines.megatron.forward import _passed_through
from tests.parallel import parity, stop_jobs
from tests.parallel.pool import Pool
from tests.tiny import write_policy

CASES = (
    ("qwen2", "one process"),
    ("qwen2", "TP2xPP2"),
    ("qwen2", "PP2xVPP2xDP2, overlapped"),
    ("qwen2", "CP2"),
    ("qwen3_moe", "PP2xEP2"),
)


@pytest.mark.parametrize(("family", "layout"), CASES, ids=[f"{f}-{layout}" for f, layout in CASES])
def test_an_update_stops_at_any_micro_batch_and_begins_anew(
    pool: Pool, tmp_path: Path, family: str, layout: str
) -> None:
    """In the passes of reference and old policy, and in the backward pass of the first batch."""
    num, parallel = parity.LAYOUTS[layout]
    policy = write_policy(tmp_path / "policy", seed=0, family=family, num_layers=4)
    ranks = pool.run(num, stop_jobs.stopped, policy, **parallel)
    for rank in ranks:
        assert rank["passed"] == rank["asked"] == ranks[0]["asked"]
        assert rank["untouched"]
        # Buckets that travel meanwhile are left half-way: such a process can only save and end.
        assert rank["same"] or "overlap" in parallel


def test_a_first_stage_that_stops_sends_what_the_next_one_has_room_for() -> None:
    """Not the host's float32: NCCL refuses the one, and waits for ever with the other."""
    stage = torch.nn.Linear(8, 8, device="meta")
    stage.pre_process = True  # type: ignore[assignment]
    stage.config = TransformerConfig(  # type: ignore[assignment]
        num_layers=1, hidden_size=8, num_attention_heads=1, pipeline_dtype=torch.bfloat16
    )
    sent = _passed_through(stage)
    assert (sent.device.type, sent.dtype, sent.shape) == ("meta", torch.bfloat16, (1, 1, 8))

"""A Hugging Face folder and a Megatron checkpoint compute the same logits, or an alarm says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.restored import restored_logits
from megatron_srpo.hf_folder import read_config
from megatron_srpo.types import AlarmError

NUM_TOKENS = 64
BOUND = 1e-4
"""Of the largest |logit|: fp32 rounds by 1e-6 of it, a wrong weight or position moves it by more
than 1e-3. Both sides compute in fp32 whatever dtype is stored, so one bound serves all."""


def verify(hf: Path, checkpoint: Path, mesh: Mesh, *, dtype: torch.dtype | None = None) -> str:
    """Compares on random tokens; returns what it found. Raises `AlarmError` beyond `BOUND`.

    `dtype`: what the conversion cast to, if it did: both sides' weights are rounded to it. Each
    model is in memory by itself, in fp32.
    """
    config = read_config(hf)
    # Two at least: what follows the last one has no logits here.
    length = max(2, min(NUM_TOKENS, config["max_position_embeddings"]))
    token_ids = np.random.default_rng(0).integers(0, config["vocab_size"], length, dtype=np.int32)
    theirs = _transformers_logits(hf, token_ids, dtype)
    ours = restored_logits(checkpoint, token_ids, mesh, cast=dtype)
    off, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    found = (
        f"verified on {length} random tokens: logits differ by at most {off:.1e}, "
        f"the largest is {largest:.1e}"
    )
    if not off <= BOUND * largest:  # NaN is beyond any bound
        raise AlarmError(f"{hf} and {checkpoint} compute other logits: {found}")
    return found


@torch.no_grad()
def _transformers_logits(
    hf: Path, token_ids: np.ndarray, dtype: torch.dtype | None
) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    for parameter in model.parameters() if dtype else ():  # `model.to` would round rotary tables
        parameter.copy_(parameter.to(dtype))
    return model.eval()(torch.tensor(token_ids[:-1], dtype=torch.long)[None]).logits[0]

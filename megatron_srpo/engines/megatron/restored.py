"""A model from a checkpoint, whole in this process, and the logits that it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_srpo.checkpoint_folder import hf_part, megatron_part
from megatron_srpo.engines.megatron import torch_dist
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import empty_model
from megatron_srpo.engines.megatron.outline import outline
from megatron_srpo.engines.megatron.weights import local_parameters
from megatron_srpo.hf_folder import read_config
from megatron_srpo.types import Tokens


@torch.no_grad()
def restored_logits(
    checkpoint: Path, token_ids: Tokens, mesh: Mesh, *, cast: torch.dtype | None = None
) -> Tensor:
    """[T, V] in fp32, of one sequence [T], from the stored weights, rounded to `cast`."""
    folder, hf = megatron_part(checkpoint), hf_part(checkpoint)
    numbered = torch_dist.has_numbered_layers(torch_dist.stored_tensors(folder))
    model = empty_model(hf, mesh, torch.float32)
    state = outline(hf, mesh, numbered=numbered).state
    torch_dist.read_into({n: p.data for n, p in local_parameters(model).items()}, folder, state)
    for parameter in model.parameters() if cast else ():
        parameter.copy_(parameter.to(cast))
    device = next(model.parameters()).device
    cu_seqlens = torch.tensor([0, len(token_ids)], dtype=torch.int32, device=device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=len(token_ids),
        max_seqlen_kv=len(token_ids),
    )
    ids = torch.tensor(token_ids, dtype=torch.long, device=device)[None]
    positions = torch.tensor(np.arange(len(token_ids)), device=device)[None]
    logits = model.eval()(ids, positions, None, packed_seq_params=packed)[0]
    return logits[:, : read_config(hf)["vocab_size"]].cpu()

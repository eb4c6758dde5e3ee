"""A model from a checkpoint, whole in this process, and the logits that it computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_srpo.checkpoint_folder import hf_part, megatron_part
from megatron_srpo.engines.megatron import torch_dist
from megatron_srpo.engines.megatron.forward import Forward
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.names import heads_of
from megatron_srpo.engines.megatron.outline import outline
from megatron_srpo.engines.megatron.weights import local_parameters
from megatron_srpo.types import Tokens


@torch.no_grad()
def restored_logits(
    checkpoint: Path, token_ids: Tokens, mesh: Mesh, *, cast: torch.dtype | None = None
) -> Tensor:
    """[T - 1, V] in fp32, of one sequence [T], from the stored weights, rounded to `cast`."""
    folder, hf = megatron_part(checkpoint), hf_part(checkpoint)
    numbered = torch_dist.has_numbered_layers(torch_dist.stored_tensors(folder))
    chunks = build_chunks(hf, mesh, torch.float32)
    parameters = {name: p.data for name, p in local_parameters(chunks, mesh).items()}
    torch_dist.read_into(parameters, folder, outline(hf, mesh, numbered=numbered).state)
    for parameter in parameters.values() if cast else ():
        parameter.copy_(parameter.to(cast))
    (logits,) = Forward(chunks, mesh, heads_of(hf)).logits([token_ids])
    return logits.cpu()

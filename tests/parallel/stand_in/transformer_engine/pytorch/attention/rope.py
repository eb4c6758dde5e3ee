from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """[T, H, D] packed; `freqs` [longest, 1, 1, D] float32."""
    assert tensor_format == "thd" and fused and cu_seqlens is not None and cp_size == 1
    assert freqs.dtype == torch.float32 and freqs.shape[1:3] == (1, 1)
    lengths = cu_seqlens.diff().tolist()
    angles = torch.cat([freqs[:length, 0] for length in lengths])
    one, other = t.float().chunk(2, dim=-1)
    turned = torch.cat([-other, one], dim=-1)
    return (t.float() * angles.cos() + turned * angles.sin()).to(t.dtype)

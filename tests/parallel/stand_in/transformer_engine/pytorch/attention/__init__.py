"""Packed causal attention, and the rules of TE's about it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        assert cp_group is None, "the stand-in knows no context parallelism"
        self.window, self.scale = window_size, softmax_scale

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> Tensor:
        """[T, H, D] -> [T, H D], sequence by sequence."""
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        assert cu_seqlens_q is not None and cu_seqlens_q.dtype == torch.int32
        assert isinstance(max_seqlen_q, int)
        lengths = cu_seqlens_q.diff().tolist()
        parts = [x.transpose(0, 1).split(lengths, 1) for x in (query_layer, key_layer, value_layer)]
        return torch.cat([self._attend(*qkv) for qkv in zip(*parts, strict=True)]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        place = torch.arange(query.shape[1])
        distance = place[:, None] - place[None]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance <= self.window[0]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=self.scale, enable_gqa=True
        ).transpose(0, 1)

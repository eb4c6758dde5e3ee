"""Core attention over packed (THD) sequences in plain torch, for machines without a GPU.

Fills the spec slot `core_attention`: Megatron's local DotProductAttention refuses packed input,
its Transformer Engine one needs CUDA. Legend: T packed tokens, S sequences, L longest, H heads,
G key-value groups, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedCausalAttention(MegatronModule):
    """softmax(q k / sqrt(D)) v inside each sequence, causal.

    Sequences are padded on the right to the longest: under a causal mask no real query sees the
    padding, so no mask tensor is needed and the cost is S L^2, not T^2.
    """

    def __init__(
        self, config: TransformerConfig, *, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__(config=config)
        head_size = config.kv_channels
        assert head_size is not None
        self.scale = head_size**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams,
        **unused: Any,
    ) -> Tensor:
        """query [T, H, D], key and value [T, G, D] -> [T, H D]."""
        cu_seqlens = packed_seq_params.cu_seqlens_q
        lengths = cu_seqlens.diff()
        row = torch.repeat_interleave(lengths)
        column = torch.arange(len(query), device=query.device) - cu_seqlens[:-1][row]
        longest = int(packed_seq_params.max_seqlen_q)

        def pad(packed: Tensor) -> Tensor:
            padded = packed.new_zeros(len(lengths), longest, *packed.shape[1:])
            return padded.index_put((row, column), packed).transpose(1, 2)  # [S, heads, L, D]

        out = F.scaled_dot_product_attention(
            pad(query), pad(key), pad(value), is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2)[row, column].flatten(1)

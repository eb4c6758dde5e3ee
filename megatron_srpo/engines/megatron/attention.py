"""A layer's attention: its own rotary frequencies, and a core in plain torch.

`RotarySelfAttention` is Megatron's with frequencies that may differ from layer to layer. The core
fills the spec slot `core_attention` on machines without a GPU: Megatron's local
DotProductAttention refuses packed (THD) input, its Transformer Engine one needs CUDA. Legend: T
packed tokens, S sequences, L longest, H heads, G key-value groups, D head size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_srpo.engines.megatron.context import gather_sequences, zigzag
from megatron_srpo.engines.megatron.positions import Positions


class RotarySelfAttention(SelfAttention):
    """The model itself has no rotary embedding (`position_embedding_type="none"`)."""

    def __init__(
        self, config: TransformerConfig, *arguments: Any, positions: Positions, **others: Any
    ) -> None:
        head_size = config.kv_channels
        assert head_size is not None
        scaled = copy.copy(config)
        scaled.softmax_scale = positions.attention_factor**2 / head_size**0.5
        super().__init__(scaled, *arguments, **others)
        self.config = config  # which learns more, later, than the copy would
        self.rotary = RotaryEmbedding(
            head_size, rotary_percent=1.0, use_cpu_initialization=config.use_cpu_initialization
        )
        self.rotary.inv_freq = positions.inverse_frequency

    def forward(  # type: ignore[override]
        self, *arguments: Any, packed_seq_params: PackedSeqParams, **others: Any
    ) -> Any:
        longest = int(packed_seq_params.max_seqlen_q)
        others["rotary_pos_emb"] = self.rotary(longest, packed_seq=True)
        return super().forward(*arguments, packed_seq_params=packed_seq_params, **others)


class PackedCausalAttention(MegatronModule):
    """softmax(q k / sqrt(D)) v inside each sequence, causal, in some layers within a window.

    Sequences are padded on the right to the longest: under a causal mask no real query sees the
    padding, so no mask is needed but for the window, and the cost is S L^2, not T^2. Under context
    parallelism every rank computes the whole and keeps its part: right, and not meant to be fast.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        softmax_scale: float,
        pg_collection: Any,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp
        self.window: int | None = None
        """A query sees itself and so many tokens before it; None: all."""
        skip: Any = config.window_attn_skip_freq
        if is_layer_window_attention(config.window_size, skip, layer_number):
            assert config.window_size is not None
            self.window = config.window_size[0]

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
        """query [T, H, D], key and value [T, G, D] -> [T, H D]; T / CP of them on each rank."""
        cu_seqlens = packed_seq_params.cu_seqlens_q
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size > 1:
            query, key, value = (
                gather_sequences(x, cu_seqlens, self.cp_group) for x in (query, key, value)
            )
        out = self._attend(query, key, value, cu_seqlens, int(packed_seq_params.max_seqlen_q))
        return out[zigzag(cu_seqlens, size)[rank]] if size > 1 else out

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        lengths = cu_seqlens.diff()
        row = torch.repeat_interleave(lengths)
        column = torch.arange(len(query), device=query.device) - cu_seqlens[:-1][row]

        def pad(packed: Tensor) -> Tensor:
            padded = packed.new_zeros(len(lengths), longest, *packed.shape[1:])
            return padded.index_put((row, column), packed).transpose(1, 2)  # [S, heads, L, D]

        out = F.scaled_dot_product_attention(
            pad(query),
            pad(key),
            pad(value),
            attn_mask=self._window_mask(longest, query.device),
            is_causal=self.window is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2)[row, column].flatten(1)

    def _window_mask(self, longest: int, device: torch.device) -> Tensor | None:
        """[L, L]: which keys a query sees."""
        if self.window is None:
            return None
        position = torch.arange(longest, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance <= self.window)

"""Which sizes of a model decide what it takes?   its config.json -> `Shape`

The weights need not be there, nor the folder, if the model is one of those whose published
config.json lies in shapes/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.names import padded_size
from megatron_srpo.hf_config import completed_config, head_size, num_experts, num_kv_heads

SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one model."""

    model: dict[str, Any]
    """Its completed config.json."""
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn: int
    """Width of a dense layer's MLP."""
    vocab: int
    """Padded, as Megatron holds it."""
    is_tied: bool
    """Input embedding and output head are one tensor."""
    qkv_bias: bool
    qk_norm: Literal["none", "head", "full"]
    num_experts: int
    """Of a layer that has some; 0: no layer has."""
    top_k: int
    """Experts that a token goes to."""
    expert_ffn: int
    expert_layers: frozenset[int]
    """Layers, from 0, whose MLP is a router and its experts."""
    windows: Sequence[int | None]
    """Tokens that a token sees, layer by layer; None: all before it."""

    @property
    def q_width(self) -> int:
        """Of all query heads together."""
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_size


def model_folder(model: Path) -> Path:
    """Where config.json is: in the folder itself, or, if that is not there, among the published
    ones under the folder's name."""
    known = SHAPES / model.name
    return known if not model.exists() and known.is_dir() else model


def read_shape(folder: Path) -> Shape:
    """Raises `InputError` for a model that `train` would refuse."""
    family, hf = family_of(folder), completed_config(folder)
    types = hf.get("layer_types") or ["full_attention"] * hf["num_hidden_layers"]
    return Shape(
        model=hf,
        num_layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=num_kv_heads(hf),
        head_size=head_size(hf),
        ffn=hf["intermediate_size"],
        vocab=padded_size(hf["vocab_size"]),
        is_tied=bool(hf["tie_word_embeddings"]),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        num_experts=num_experts(hf),
        top_k=hf.get("num_experts_per_tok") or 0,
        expert_ffn=hf.get("moe_intermediate_size") or 0,
        expert_layers=frozenset(
            layer
            for layer in range(hf["num_hidden_layers"])
            if num_experts(hf)
            and layer not in (hf.get("mlp_only_layers") or ())
            and (layer + 1) % hf.get("decoder_sparse_step", 1) == 0
        ),
        windows=[hf["sliding_window"] if kind == "sliding_attention" else None for kind in types],
    )

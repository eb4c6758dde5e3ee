"""How many parameters does a rank hold?   shape, layout, stage -> counts

As Megatron-Core 0.16.1 divides them: linear layers, embedding and head over tensor parallel ranks;
norms and routers whole on each; experts over expert parallel ranks, and over tensor parallel ones
where nobody shares them (`engines/megatron/mesh.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.plan.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Parameters of one rank."""

    dense: int
    """All but experts': copies of them are data and context parallel."""
    experts: int
    """Copies of them are on other ranks: `expert_copies`."""
    linear: int
    """Of both, the weights of layers' linear maps: what FP8 multiplies."""

    @property
    def total(self) -> int:
        """Of both kinds."""
        return self.dense + self.experts


def layers_of(shape: Shape, parallel: ParallelConfig, stage: int) -> list[int]:
    """Of a pipeline stage, which holds `vpp` separate runs of them."""
    run = shape.num_layers // (parallel.pp * parallel.vpp)
    firsts = [(chunk * parallel.pp + stage) * run for chunk in range(parallel.vpp)]
    return [layer for first in firsts for layer in range(first, first + run)]


def counts_of(shape: Shape, parallel: ParallelConfig, stage: int) -> Counts:
    """Of every rank of a stage: they hold equally many."""
    kinds = Counter(layer in shape.expert_layers for layer in layers_of(shape, parallel, stage))
    tp, ep = parallel.tp, parallel.ep
    attention = attention_weights(shape) // tp
    mlp = 3 * shape.hidden * shape.ffn // tp
    expert = 3 * shape.hidden * shape.expert_ffn // (tp if ep == 1 else 1)
    experts = kinds[True] * shape.num_experts // ep * expert
    router = shape.num_experts * shape.hidden
    linear = kinds.total() * attention + kinds[False] * mlp
    dense = linear + kinds.total() * _small(shape, tp) + kinds[True] * router
    return Counts(
        dense=dense + _ends(shape, parallel, stage), experts=experts, linear=linear + experts
    )


def attention_weights(shape: Shape) -> int:
    """Of one whole layer: queries, keys, values, and what leaves."""
    return shape.hidden * (2 * shape.q_width + 2 * shape.kv_width)


def _small(shape: Shape, tp: int) -> int:
    """Norms and biases of a layer."""
    bias = (shape.q_width + 2 * shape.kv_width) // tp if shape.qkv_bias else 0
    of_heads = {"none": 0, "head": 2 * shape.head_size, "full": shape.q_width + shape.kv_width}
    return 2 * shape.hidden + bias + of_heads[shape.qk_norm]


def _ends(shape: Shape, parallel: ParallelConfig, stage: int) -> int:
    """Embedding, final norm, head: a tied head is a copy where the embedding is elsewhere."""
    table = shape.vocab * shape.hidden // parallel.tp
    is_first, is_last = stage == 0, stage == parallel.pp - 1
    has_head = is_last and not (shape.is_tied and is_first)
    return table * (is_first + has_head) + shape.hidden * is_last


def rollout_weights(shape: Shape, tp: int) -> tuple[int, int]:
    """What a rank of a vLLM engine holds: all parameters, and of them those of layers' linear maps.
    A key-value head that has several ranks is whole on each."""
    kv_width = max(shape.kv_width // tp, shape.head_size)
    attention = shape.hidden * (2 * shape.q_width // tp + 2 * kv_width)
    num_sparse = len(shape.expert_layers)
    num_dense = shape.num_layers - num_sparse
    linear = shape.num_layers * attention + 3 * shape.hidden // tp * (
        num_dense * shape.ffn + num_sparse * shape.num_experts * shape.expert_ffn
    )
    others = shape.num_layers * _small(shape, tp) + num_sparse * shape.num_experts * shape.hidden
    tables = (1 if shape.is_tied else 2) * shape.vocab * shape.hidden // tp
    return linear + others + tables + shape.hidden, linear


def active_weights(shape: Shape, layers: Sequence[int]) -> int:
    """Weights of these whole layers' linear maps that a token is multiplied with."""
    num_sparse = sum(layer in shape.expert_layers for layer in layers)
    router = shape.num_experts * shape.hidden
    chosen = 3 * shape.hidden * shape.expert_ffn * shape.top_k
    return (
        len(layers) * attention_weights(shape)
        + (len(layers) - num_sparse) * 3 * shape.hidden * shape.ffn
        + num_sparse * (router + chosen)
    )

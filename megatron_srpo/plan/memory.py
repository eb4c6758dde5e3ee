"""What does each phase hold on a GPU?   setup -> bytes, of the pipeline's stage that needs most

    generate    the learner's weights, the engine's, keys and values
    train       the learner; the engine sleeps at level 2 and holds nothing
    sync        the learner's weights, the engine's, and the largest tensor on its way
    checkpoint  the learner, and a part of the optimizer's state on its way to the host

While the engine is awake, what `colocation.park` names is in host memory, gradients nowhere: an
update begins with none. Every number is of the largest micro-batch that the config allows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Literal

from megatron_srpo.kernels.products import CHUNK
from megatron_srpo.plan.hardware import ENGINE_BATCH_TOKENS, OVERHEAD_BYTES
from megatron_srpo.plan.parameters import Counts, counts_of, layers_of, rollout_weights
from megatron_srpo.plan.setup import Setup

GIB = 2**30
WIDE = 4
"""Bytes of an fp32 number."""
Phase = Literal["generate", "train", "sync", "checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Bytes on one GPU; `host` in the host memory of its process."""

    phase: Phase
    stage: int
    """Of the pipeline: the one that needs most."""
    weights: int = 0
    """The learner's, copies in FP8 included."""
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Kept for the backward pass, and the gradients of one layer's."""
    head: int = 0
    """Logits, and all else from hidden states to the loss."""
    rollout_weights: int = 0
    kv_cache: int = 0
    workspace: int = 0
    """Of the engine's forward pass; of tensors on their way."""
    overhead: int = OVERHEAD_BYTES
    """What no tensor of ours is."""
    host: int = 0

    @property
    def state(self) -> int:
        """What the trainer has from step to step, counted as Megatron makes it."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """On the GPU."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(
    field.name for field in fields(PhaseMemory) if field.name not in ("phase", "stage", "host")
)


def plan_memory(setup: Setup) -> tuple[PhaseMemory, ...]:
    """One of each phase."""
    by_stage = [_of_stage(setup, stage) for stage in range(setup.cfg.parallel.pp)]
    return tuple(max(phases, key=lambda each: each.total) for phases in zip(*by_stage, strict=True))


def planned_gib(setup: Setup) -> dict[str, float]:
    """By phase, and of the start: there the trainer is whole before it lends, and then the engine
    comes."""
    phases = plan_memory(setup)
    sizes: dict[str, int] = {each.phase: each.total for each in phases}
    start = max(each.state + each.overhead for each in phases)
    sizes["start"] = max(start, sizes["generate"])
    return {phase: size / GIB for phase, size in sizes.items()}


def _of_stage(setup: Setup, stage: int) -> tuple[PhaseMemory, ...]:
    counts = counts_of(setup.shape, setup.cfg.parallel, stage)
    weights, optimizer = weight_bytes(setup, counts), optimizer_bytes(setup, counts)
    reference = setup.element_bytes * counts.total * (setup.cfg.loss.kl_coef > 0)
    host = reference + optimizer_bytes(setup, counts, on_host=True)
    learner = {"weights": weights, "gradients": WIDE * counts.total, "optimizer": optimizer}
    stays = {part: size for part, size in learner.items() if part not in setup.cfg.colocation.park}
    lent = sum(size for part, size in learner.items() if part not in {*stays, "gradients"})
    engine = {"stage": stage, "rollout_weights": engine_weight_bytes(setup)}
    return (
        PhaseMemory(
            phase="generate",
            **engine,
            **stays,
            kv_cache=setup.cfg.rollout.kv_cache_bytes,
            workspace=_engine_workspace(setup),
            host=host + lent,
        ),
        PhaseMemory(
            phase="train",
            stage=stage,
            **learner,
            activations=activation_bytes(setup, stage),
            head=head_bytes(setup) if stage == setup.cfg.parallel.pp - 1 else 0,
            host=host,
        ),
        PhaseMemory(
            phase="sync",
            **engine,
            **stays | {"weights": weights},
            workspace=_on_its_way(setup),
            host=host + lent - weights * ("weights" not in stays),
        ),
        PhaseMemory(
            phase="checkpoint",
            stage=stage,
            **learner,
            workspace=_gathered_state(setup, counts),
            # Megatron's `fully_reshardable`: all copies' shares, on every rank.
            host=host + (3 * WIDE + setup.element_bytes) * counts.total,
        ),
    )


def weight_bytes(setup: Setup, counts: Counts) -> int:
    """Of the learner's parameters on a rank."""
    element, copies = setup.element_bytes, setup.fp8_share * counts.linear
    kept = counts.total - copies * setup.cfg.fp8.param_gather
    return round(element * kept + 2 * copies)


def optimizer_bytes(setup: Setup, counts: Counts, *, on_host: bool = False) -> int:
    """This rank's share of Adam's two moments and, where weights are not fp32, of the masters; of
    it what `optimizer.offload_fraction` leaves on the GPU, or has on the host."""
    per_parameter = 2 * WIDE if setup.cfg.dtype == "float32" else 3 * WIDE
    shared = counts.dense / setup.copies + counts.experts / setup.expert_copies
    fraction = setup.cfg.optimizer.offload_fraction
    return round(per_parameter * shared * (fraction if on_host else 1 - fraction))


def engine_weight_bytes(setup: Setup) -> int:
    """Of a rank of a rollout engine."""
    total, linear = rollout_weights(setup.shape, setup.cfg.rollout.tp)
    return setup.element_bytes * total - linear * setup.cfg.fp8.rollout


def activation_bytes(setup: Setup, stage: int) -> int:
    """Kept from forward passes to backward passes at the fullest moment, and what the backward pass
    of a layer needs beside it."""
    parallel, shape = setup.cfg.parallel, setup.shape
    tokens = setup.micro_batch_tokens // parallel.cp
    layers = layers_of(shape, parallel, stage)
    kinds = Counter(layer in shape.expert_layers for layer in layers)
    sizes = {kind: tokens * layer_bytes(setup, is_sparse=kind) for kind in kinds}
    kept, again = sum(num * sizes[kind] for kind, num in kinds.items()), 0
    if parallel.recompute == "full":
        kept = len(layers) * tokens * setup.element_bytes * shape.hidden // parallel.tp
        again = max(sizes.values())
    # The layer's input and its gradient are gathered over tensor parallel ranks.
    around = tokens * setup.element_bytes * (2 * shape.hidden + 4 * shape.ffn // parallel.tp)
    return round(_in_flight(setup, stage) * kept) + again + around


def _in_flight(setup: Setup, stage: int) -> float:
    """Micro-batches whose activations a stage holds: 1F1B; interleaved: of chunks (Megatron-Core's
    schedules.py, `num_warmup_microbatches`)."""
    pp, vpp = setup.cfg.parallel.pp, setup.cfg.parallel.vpp
    if vpp == 1:
        return pp - stage
    return ((pp - stage - 1) * 2 + (vpp - 1) * pp + 1) / vpp


def layer_bytes(setup: Setup, *, is_sparse: bool) -> int:
    """That a layer keeps of a token on a tensor parallel rank, without recomputation.

    Norms keep what goes in and linear maps what goes in; attention keeps queries and keys before
    and after they are turned, values and its output (no scores); gate, up and their product, and
    without Transformer Engine's kernel silu of the gate and up with an offset (megatron-core
    0.16.1, mlp.py, `glu`).
    """
    shape, tp, ep = setup.shape, setup.cfg.parallel.tp, setup.cfg.parallel.ep
    q, kv, hidden = shape.q_width, shape.kv_width, shape.hidden
    glu = 3 if setup.backend.is_engine else 5
    attention = 2 * hidden + (q + 2 * kv) + (q + kv) + q
    if is_sparse:
        gathered = 1 if ep > 1 else tp
        mlp = 2 * hidden + shape.top_k * (2 * hidden * gathered + glu * shape.expert_ffn)
    else:
        mlp = 2 * hidden + glu * shape.ffn
    return (setup.element_bytes * (attention + mlp) + WIDE * shape.num_heads) // tp


def head_bytes(setup: Setup) -> int:
    """Of the last stage, when every token of the largest micro-batch has a loss."""
    shape, parallel = setup.shape, setup.cfg.parallel
    tokens, columns = setup.micro_batch_tokens // parallel.cp, shape.vocab // parallel.tp
    if setup.cfg.kernels.head == "reference":
        return reference_head_bytes(tokens, columns, shape.hidden, setup.element_bytes)
    return fused_head_bytes(tokens, columns, shape.hidden, setup.element_bytes)


def fused_head_bytes(tokens: int, columns: int, hidden: int, element: int) -> int:
    """`kernels/linear_logprob.py`: hidden states gathered and chosen, their gradient in fp32, a
    chunk of logits and its gradient, and the weight's gradient of zeros."""
    chunk = min(CHUNK, columns)
    return (
        tokens * hidden * (2 * element + WIDE)
        + tokens * chunk * (WIDE + element)
        + columns * hidden * element
    )


def reference_head_bytes(tokens: int, columns: int, hidden: int, element: int) -> int:
    """`engines/megatron/logprobs.py`: logits in fp32, three more like them for entropies."""
    return tokens * hidden * element + tokens * columns * 4 * WIDE


def _engine_workspace(setup: Setup) -> int:
    """Of vLLM: activations of a step full of prompts; logits of all sequences, thrice in fp32."""
    shape, rollout = setup.shape, setup.cfg.rollout
    per_token = 4 * shape.hidden + (3 * shape.ffn + 2 * shape.q_width) // rollout.tp
    logits = 3 * WIDE * rollout.max_num_seqs * shape.vocab
    return ENGINE_BATCH_TOKENS * setup.element_bytes * per_token + logits


def _on_its_way(setup: Setup) -> int:
    """The largest tensor of a weight sync: this rank's shard of it, those of all tensor parallel
    ranks as they come, and the whole."""
    shape = setup.shape
    largest = max(shape.vocab, 2 * shape.ffn) * shape.hidden * setup.element_bytes
    tp = setup.cfg.parallel.tp
    return largest if setup.model_size == 1 else 2 * largest + (largest // tp) * (tp > 1)


def _gathered_state(setup: Setup, counts: Counts) -> int:
    """One of Adam's three numbers of a bucket, of all copies, and this rank's own share."""
    num = counts.total
    if setup.cfg.parallel.overlap:  # DistributedDataParallel's buckets, which else are one
        num = min(num, max(40_000_000, 1_000_000 * setup.copies))
    return round(WIDE * num * (1 + 1 / setup.copies))

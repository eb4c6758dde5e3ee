"""How long does a step take?   setup, tokens -> FLOPs and seconds, phase by phase

An estimate from stated rates (`hardware.py`), to compare layouts and to book hours: nothing of it
has been measured. Phases follow each other; communication that a layout needs in every layer is
added to the computation, that of gradients only without `parallel.overlap`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from megatron_srpo.plan.hardware import (
    ALL_REDUCE_S,
    DECODE_SHARE,
    ENGINE_STEP_S,
    FP8_SHARE,
    LINK_SHARE,
    PREFILL_SHARE,
    SYNC_SHARE,
    TRAIN_SHARE,
)
from megatron_srpo.plan.memory import WIDE, engine_weight_bytes, optimizer_bytes, weight_bytes
from megatron_srpo.plan.parameters import active_weights, counts_of, layers_of, rollout_weights
from megatron_srpo.plan.setup import Setup
from megatron_srpo.plan.shape import Shape
from megatron_srpo.plan.tokens import Stage, StepTokens, evaluation, step_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """All updates of a step."""

    seconds: float
    flops: float
    """Over all GPUs; what is computed again for `parallel.recompute` is not counted."""
    num_micro_batches: int
    """Of a copy of the policy and an update."""
    bubble: float
    """Share of the time in which a stage of the pipeline waits for others."""
    mfu: float
    """`flops` over what the GPUs could do in that time, in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """A weight sync."""

    bytes: int
    """That come to each GPU."""
    floor_s: float
    """What the slowest way would take at its full rate: links, or the GPU's memory."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Of one step."""

    tokens: StepTokens
    stages_s: tuple[float, ...]
    """Of the tokens' stages."""
    park_s: float
    """What is lent to the host and back."""
    train: Training
    sync: Sync
    evaluate_s: float
    """Of an evaluation, which not every step has."""
    generate_flops: float
    """Of the step, over all GPUs."""

    @property
    def generate_s(self) -> float:
        """Of all stages."""
        return sum(self.stages_s)

    @property
    def step_s(self) -> float:
        """Without evaluation, rewards, checkpoints and waiting."""
        return self.generate_s + self.park_s + self.train.seconds + self.sync.seconds


def plan_step(setup: Setup) -> StepTime:
    """Everything at once."""
    tokens = step_tokens(setup.cfg)
    return StepTime(
        tokens=tokens,
        stages_s=tuple(generation_s(setup, stage) for stage in tokens.stages),
        park_s=_park_s(setup),
        train=_train(setup, tokens),
        sync=plan_sync(setup),
        evaluate_s=generation_s(setup, evaluation(setup.cfg)),
        generate_flops=sum(_generation_flops(setup, stage) for stage in tokens.stages),
    )


def run_hours(setup: Setup, step: StepTime) -> float:
    """Of the whole run, evaluations included."""
    num_evaluations = ceil(setup.cfg.num_steps / setup.cfg.eval.every) + 1
    return (setup.cfg.num_steps * step.step_s + num_evaluations * step.evaluate_s) / 3600


# --- training ------------------------------------------------------------------------------------


def _train(setup: Setup, tokens: StepTokens) -> Training:
    cfg, parallel = setup.cfg, setup.cfg.parallel
    per_update = tokens.trained / setup.dp / cfg.loss.updates_per_batch
    num = max(ceil(per_update / setup.micro_batch_tokens), 1)
    if parallel.vpp > 1:
        num = ceil(num / parallel.pp) * parallel.pp
    size, wanted = per_update / num, tokens.wanted / tokens.trained
    slowest = max(
        _stage_s(setup, stage, size, wanted, tokens.sequence_length) for stage in range(parallel.pp)
    )
    filling = (parallel.pp - 1) / parallel.vpp
    backward_s = (num + filling) * slowest
    # Forward passes for log-probs before the first update, and under the initial policy.
    updates = cfg.loss.updates_per_batch
    others = (updates - 1) / updates + (cfg.loss.kl_coef > 0)
    train_s = updates * (backward_s * (1 + others / 3) + _step_s(setup, backward_s))
    flops = _train_flops(setup, tokens) * (1 + others / 3)
    return Training(
        seconds=train_s,
        flops=flops,
        num_micro_batches=num,
        bubble=filling / (num + filling),
        mfu=flops / (train_s * setup.num_gpus * setup.gpu.bf16_flops),
    )


def _attention_flops(shape: Shape, layers: Sequence[int], seen: float) -> float:
    """Forward, of a token in these layers, behind so many others: scores, and what they weigh."""
    windows = Counter(shape.windows[layer] for layer in layers)
    tokens = sum(n * (seen if w is None else min(seen, w)) for w, n in windows.items())
    return 4 * tokens * shape.q_width


def _forward_flops(shape: Shape, layers: Sequence[int], seen: float) -> float:
    return 2 * active_weights(shape, layers) + _attention_flops(shape, layers, seen)


def _train_flops(setup: Setup, tokens: StepTokens) -> float:
    shape = setup.shape
    # Under a causal mask a token sees half of its sequence, in the mean.
    forward = _forward_flops(shape, range(shape.num_layers), tokens.sequence_length / 2)
    return 3 * (tokens.trained * forward + tokens.wanted * 2 * shape.vocab * shape.hidden)


def _stage_s(setup: Setup, stage: int, num_tokens: float, wanted: float, length: float) -> float:
    """Forward and backward pass of a micro-batch of `num_tokens`, of which the share `wanted` has a
    loss."""
    gpu, shape, parallel = setup.gpu, setup.shape, setup.cfg.parallel
    layers = layers_of(shape, parallel, stage)
    passes = 4 if parallel.recompute == "full" else 3
    linear = 2 * passes * active_weights(shape, layers)
    attention = passes * _attention_flops(shape, layers, length / 2)
    is_last = stage == parallel.pp - 1
    head = 4 * 2 * shape.vocab * shape.hidden * wanted * is_last  # logits are made twice
    rate = TRAIN_SHARE * gpu.bf16_flops
    share = setup.fp8_share
    per_linear = share / (FP8_SHARE * gpu.fp8_flops) + (1 - share) / rate
    computed = num_tokens * (linear * per_linear + (attention + head) / rate)
    computed /= parallel.tp * parallel.cp
    return computed + len(layers) * layer_traffic_s(setup, num_tokens, passes)


def layer_traffic_s(setup: Setup, num_tokens: float, passes: int) -> float:
    """Sequence parallelism gathers and scatters four times a forward pass and six times a backward
    pass; context parallelism sends keys and values around, and their gradients; tokens travel to
    their experts and back."""
    gpu, shape, parallel = setup.gpu, setup.shape, setup.cfg.parallel
    tp, cp, ep = parallel.tp, parallel.cp, parallel.ep
    hidden = num_tokens / cp * shape.hidden * setup.element_bytes
    times = 6 + 4 * (passes - 2)
    sent = times * hidden * (tp - 1) / tp
    keys = num_tokens * 2 * shape.kv_width * setup.element_bytes / tp
    sent += passes * keys * (cp - 1) / cp
    share = len(shape.expert_layers) / shape.num_layers
    # There and back in the forward pass, and so with gradients.
    sent += 2 * (passes - 1) * share * shape.top_k * hidden / tp * (ep - 1) / ep
    is_within = tp * max(cp, ep) <= gpu.per_node
    return sent / (LINK_SHARE * (gpu.link_rate if is_within else gpu.network_rate))


def _step_s(setup: Setup, backward_s: float) -> float:
    """Gradients summed and scattered in fp32, Adam, weights gathered."""
    gpu, copies = setup.gpu, setup.copies
    counts = [counts_of(setup.shape, setup.cfg.parallel, n) for n in range(setup.cfg.parallel.pp)]
    largest = max(counts, key=lambda each: each.total)
    sent = (WIDE + setup.element_bytes) * largest.total * (copies - 1) / copies
    is_within = setup.cfg.parallel.tp * copies <= gpu.per_node
    sent_s = sent / (LINK_SHARE * (gpu.link_rate if is_within else gpu.network_rate))
    if setup.cfg.parallel.overlap:
        sent_s = max(sent_s - backward_s, 0.0)
    here, away = (optimizer_bytes(setup, largest, on_host=there) for there in (False, True))
    # A GPU's share of its host's memory is about as fast as the way there.
    host_s = away / (LINK_SHARE * gpu.host_rate)
    return sent_s + 2.5 * (here / (DECODE_SHARE * gpu.memory_rate) + host_s)


def _park_s(setup: Setup) -> float:
    """Once each way; gradients are dropped."""
    counts = [counts_of(setup.shape, setup.cfg.parallel, n) for n in range(setup.cfg.parallel.pp)]
    sizes = {"weights": weight_bytes, "optimizer": optimizer_bytes}
    lent = [size for part, size in sizes.items() if part in setup.cfg.colocation.park]
    most = max(sum(size(setup, each) for size in lent) for each in counts)
    return 2 * most / (LINK_SHARE * setup.gpu.host_rate)


# --- generation ----------------------------------------------------------------------------------


def kv_bytes_per_token(setup: Setup) -> float:
    """Keys and values of a token on a rank of an engine."""
    shape, tp = setup.shape, setup.cfg.rollout.tp
    width = max(shape.kv_width // tp, shape.head_size)
    return 2 * shape.num_layers * width * setup.element_bytes


def generation_s(setup: Setup, stage: Stage) -> float:
    """Of one engine's share: prompts are read, then sequences decode together, as many as the
    config and the cache allow. When one ends the next begins, until none waits; then those that run
    end, of n with equally spread lengths the last one after n / (n + 1) of the longest there may
    be."""
    cfg, gpu = setup.cfg.rollout, setup.gpu
    num = stage.num / setup.num_engines
    per_token = kv_bytes_per_token(setup)
    in_cache = cfg.kv_cache_bytes / (per_token * (stage.context + stage.generated))
    together = max(min(num, cfg.max_num_seqs, in_cache), 1.0)
    queued = max(num / together - 1, 0.0)
    num_steps = queued * stage.generated + stage.longest * together / (together + 1)
    mean_together = num * stage.generated / num_steps
    context = stage.context + stage.generated / 2
    read = engine_weight_bytes(setup) + mean_together * context * per_token
    flops = mean_together * _token_flops(setup, context) / cfg.tp
    step_s = max(
        read / (DECODE_SHARE * gpu.memory_rate), flops / (PREFILL_SHARE * _rollout_rate(setup))
    )
    step_s += ENGINE_STEP_S + 2 * setup.shape.num_layers * ALL_REDUCE_S * (cfg.tp > 1)
    read_flops = num * stage.read * _token_flops(setup, stage.context / 2) / cfg.tp
    return num_steps * step_s + read_flops / (PREFILL_SHARE * _rollout_rate(setup))


def _rollout_rate(setup: Setup) -> float:
    """FLOPs per second of linear maps, which are most of it."""
    return setup.gpu.fp8_flops if setup.cfg.fp8.rollout else setup.gpu.bf16_flops


def _token_flops(setup: Setup, context: float) -> float:
    """Forward, with logits, behind so many tokens."""
    shape = setup.shape
    head = 2 * shape.vocab * shape.hidden
    return _forward_flops(shape, range(shape.num_layers), context) + head


def _generation_flops(setup: Setup, stage: Stage) -> float:
    decoded = stage.generated * _token_flops(setup, stage.context + stage.generated / 2)
    return stage.num * (decoded + stage.read * _token_flops(setup, stage.context / 2))


# --- weight sync ---------------------------------------------------------------------------------


def plan_sync(setup: Setup) -> Sync:
    """Every rank sees every whole tensor, brings its own share along, and writes the engine's."""
    gpu, parallel, shape = setup.gpu, setup.cfg.parallel, setup.shape
    whole = setup.element_bytes * rollout_weights(shape, 1)[0]
    expert = setup.element_bytes * 3 * shape.hidden * shape.expert_ffn
    experts = len(shape.expert_layers) * shape.num_experts * expert
    holders = parallel.pp * (parallel.ep if parallel.ep > 1 else parallel.tp)
    come = round((whole - experts) * (1 - 1 / setup.model_size) + experts * (1 - 1 / holders))
    # Stages are as far apart as can be: consecutive ranks are tensor, context, data parallel.
    spread = setup.num_gpus if parallel.pp > 1 else max(parallel.tp, parallel.ep)
    rate = gpu.link_rate if spread <= gpu.per_node else gpu.network_rate
    written = 2 * whole + engine_weight_bytes(setup)
    floor_s = max(come / rate, written / gpu.memory_rate)
    return Sync(bytes=come, floor_s=floor_s, seconds=floor_s / SYNC_SHARE)

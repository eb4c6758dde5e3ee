"""How fast and how large is a GPU?   stated rates, and which share of them is assumed

Peaks are NVIDIA's datasheets' (dense, no sparsity); memory is what `nvidia-smi` shows. What is
reached of the peaks is assumed: no GPU has run this code yet.
"""

from __future__ import annotations

from dataclasses import dataclass

TFLOPS, GB = 1e12, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One of a node."""

    name: str
    capability: tuple[int, int]
    """Compute capability."""
    memory_bytes: int
    bf16_flops: float
    """Per second, dense; fp32 sums."""
    fp8_flops: float
    memory_rate: float
    """Bytes per second."""
    link_rate: float
    """Bytes per second and direction, to the node's other GPUs."""
    network_rate: float = 50 * GB
    """Bytes per second and direction, to other nodes: one 400 Gbit/s adapter a GPU."""
    host_rate: float = 64 * GB
    """Bytes per second and direction, to host memory: PCIe 5, 16 lanes."""
    per_node: int = 8


GPUS = {
    # NVIDIA H100 Tensor Core GPU datasheet, SXM
    "h100": Gpu(
        name="H100 SXM 80 GB",
        capability=(9, 0),
        memory_bytes=81559 * 2**20,
        bf16_flops=989 * TFLOPS,
        fp8_flops=1979 * TFLOPS,
        memory_rate=3350 * GB,
        link_rate=450 * GB,
    ),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM
    "h200": Gpu(
        name="H200 SXM 141 GB",
        capability=(9, 0),
        memory_bytes=143771 * 2**20,
        bf16_flops=989 * TFLOPS,
        fp8_flops=1979 * TFLOPS,
        memory_rate=4800 * GB,
        link_rate=450 * GB,
    ),
    # NVIDIA DGX B200 datasheet, an eighth of it
    "b200": Gpu(
        name="B200 180 GB",
        capability=(10, 0),
        memory_bytes=183359 * 2**20,
        bf16_flops=2250 * TFLOPS,
        fp8_flops=4500 * TFLOPS,
        memory_rate=8000 * GB,
        link_rate=900 * GB,
    ),
}


def known(name: str) -> Gpu | None:
    """By what its driver calls it.

    >>> known("NVIDIA H100 80GB HBM3").memory_bytes // 2**30
    79
    """
    return next((gpu for key, gpu in GPUS.items() if key in name.lower()), None)


TRAIN_SHARE = 0.40
"""Of a peak's FLOPs, in a stage's forward and backward pass without its communication. Published:
0.31 to 0.40 (verl, Qwen3-30B-A3B), up to 0.47 (Megatron-LM, pre-training), bf16."""
FP8_SHARE = 0.33
"""The same of the FP8 peak, of layers' linear maps alone. Published: 0.376 of the whole
(Megatron-Bridge, Llama 3 8B, pre-training)."""
PREFILL_SHARE = 0.45
"""Of a peak's FLOPs, in prompts of the rollout engine and where decoding is bound by them."""
DECODE_SHARE = 0.60
"""Of the memory's rate, where decoding is bound by it."""
LINK_SHARE = 0.75
"""Of a link's, the network's and the host's rate, in large messages."""
SYNC_SHARE = 0.50
"""Of the rate of a weight sync's floor."""
ENGINE_STEP_S = 0.004
"""Of each decoding step, whatever it computes: scheduling, sampling, log-probs on the host."""
ALL_REDUCE_S = 15e-6
"""Latency of a small all-reduce in a node."""
OVERHEAD_BYTES = 6 * 2**30
"""On each GPU, beside tensors: CUDA contexts, communicators, cuBLAS, the engine's CUDA graphs, what
the allocators hold without using it. Published leftovers of colocation: 3 to 8 GB."""
PUBLISHED = 1.9
"""How many times a plan's seconds a published run may have taken: 1.9 and 1.1 times (NeMo-RL, 2,048
responses a step: Llama 3.1 8B on 16 H100, 93 s; Qwen3-32B on 32, 376 s)."""
ENGINE_BATCH_TOKENS = 16384
"""Prompt tokens in one step of the rollout engine: vLLM's default on such GPUs."""

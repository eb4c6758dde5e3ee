"""What do the log-probs of a large vocabulary cost?   both heads and the loss, time and memory

    python tools/bench_head.py [--rows 512] [--vocab 152064] [--hidden 896] [--repeat 5]

fp32, one process and one thread for each way and each share of rows that are wanted. The ways:
`reference` and `fused` are the heads, whose log-probs are summed; `loss in turn` is the fused head
and then the policy loss (ppo, kl, token weights), `loss in one pass` the same loss. Memory is what
the process grows by at its highest in its first pass (VmHWM, reset when the inputs are made), in
MB = 10^6 bytes: forward alone, then with backward. The latter holds the gradients, which every way
must give: `gradients_mb`. Seconds are the process's own on a core, medians of the passes after it.
`logprob_error` is the largest difference of a log-prob from float64. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_srpo.environment import be_one_process_unless_launched, set_environment

TEMPERATURE = 0.8
CASES = (
    ("reference", 1.0),
    ("fused", 1.0),
    ("reference", 0.5),
    ("fused", 0.5),
    ("loss in turn", 1.0),
    ("loss in one pass", 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of both heads.")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = arguments.rows, arguments.vocab, arguments.hidden
    found: dict[str, Any] = {}
    for way, share in CASES:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            job = alone.submit(measured, way, sizes, share, arguments.repeat)
            found[f"{way}, {share:.0%} of rows wanted"] = job.result()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "hardware": f"1 of {os.cpu_count()} cores, {platform.machine()}, no GPU",
        "rows_vocab_hidden": sizes,
        "one_fp32_logits_tensor_mb": sizes[0] * sizes[1] * 4 / 1e6,
        "ways": found,
    }
    print(json.dumps(report, indent=1))


def measured(way: str, sizes: tuple[int, int, int], share: float, repeat: int) -> dict[str, float]:
    """All numbers of one way, in the process that this is."""
    warnings.simplefilter("ignore")
    set_environment()
    be_one_process_unless_launched()
    import torch

    from megatron_srpo.engines.megatron.mesh import build_mesh, destroy_mesh

    num_rows, vocab, width = sizes
    group = build_mesh().tp_group
    hidden = torch.randn(num_rows, width).requires_grad_()
    weight = torch.empty(vocab, width).normal_(std=0.1).requires_grad_()
    targets = torch.randint(0, vocab, (num_rows,))
    is_wanted = torch.arange(num_rows) < share * num_rows
    compute = {"loss in turn": in_turn, "loss in one pass": in_one_pass}.get(way, log_probs)
    seconds: dict[str, list[float]] = {"forward_s": [], "backward_s": []}
    peaks_mb: list[float] = []
    logprobs = hidden.new_zeros(0)
    before = resident_mb(reset=True)
    for _ in range(repeat + 1):  # the first warms up
        hidden.grad = weight.grad = None
        start = time.process_time()
        loss, logprobs = compute(way, hidden, weight, targets, is_wanted, group)
        middle = time.process_time()
        peaks_mb.append(resident_mb() - before)
        loss.backward()
        seconds["forward_s"].append(middle - start)
        seconds["backward_s"].append(time.process_time() - middle)
        peaks_mb.append(resident_mb() - before)
    destroy_mesh()
    chosen = is_wanted.nonzero()[:64, 0]
    exact = (hidden[chosen].double() @ weight.double().T / TEMPERATURE).log_softmax(-1)
    right = exact.gather(1, targets[chosen, None])[:, 0]
    return {
        **{name: round(statistics.median(values[1:]), 3) for name, values in seconds.items()},
        "forward_mb": round(peaks_mb[0], 1),
        "forward_backward_mb": round(peaks_mb[1], 1),
        "gradients_mb": round((hidden.numel() + weight.numel()) * 4 / 1e6, 1),
        "logprob_error": (logprobs[chosen].double() - right).abs().max().item(),
    }


def log_probs(way: str, *case: Any) -> Any:
    """Their sum, and log-probs."""
    from megatron_srpo.engines.megatron.logprobs import HEADS

    hidden, weight, targets, is_wanted, group = case
    options: Any = {"temperature": TEMPERATURE, "num_real": len(weight), "group": group}
    logprobs, _ = HEADS[way](hidden, weight, targets, is_wanted, **options)  # type: ignore[index]
    return logprobs.sum(), logprobs


def in_turn(way: str, *case: Any) -> Any:
    """Loss and log-probs."""
    from megatron_srpo.kernels.policy_loss import policy_loss

    _, logprobs = log_probs("fused", *case)
    return policy_loss(logprobs, *tokens_and_loss(len(logprobs)), denominator=1.0)[0], logprobs


def in_one_pass(way: str, *case: Any) -> Any:
    """Loss and log-probs."""
    from megatron_srpo.kernels.linear_policy_loss import linear_policy_loss

    hidden, weight, targets, _, group = case
    tokens, cfg = tokens_and_loss(len(targets))
    loss, _, logprobs, _ = linear_policy_loss(
        hidden, weight, targets, tokens, cfg,
        denominator=1.0, temperature=TEMPERATURE, group=group,
    )  # fmt: skip
    return loss, logprobs


def tokens_and_loss(num: int) -> Any:
    """Policies near one another, and every part of a loss that is a sum over tokens."""
    import torch

    from megatron_srpo.config import LossConfig
    from megatron_srpo.loss import TokenTensors

    noise = torch.randn(4, num, generator=torch.Generator().manual_seed(0))
    tokens = TokenTensors(
        loss_weight_T=torch.ones(num),
        advantage_T=noise[0],
        rollout_T=noise[1] - 12,
        old_T=noise[1] + 0.1 * noise[2] - 12,
        reference_T=noise[1] + 0.1 * noise[3] - 12,
        cu_seqlens=torch.tensor([0, num]),
    )
    return tokens, LossConfig(surrogate="ppo", kl_coef=0.1, importance="token_truncate")


def resident_mb(*, reset: bool = False) -> float:
    """The most that was resident since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()

"""Does the CUDA kernel touch what is not its own, or race?   compute-sanitizer, in a process"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_srpo.kernels import logits_policy_loss
from tools.gpu.result import Result, not_run

TOOLS = ("memcheck", "racecheck", "synccheck")
TIMEOUT_S = 120
PROGRAM = """
import torch
from tools.gpu.kernel_correctness import CONFIGS, one_read_error
for cfg in CONFIGS.values():
    numbers, bounds = one_read_error(cfg, torch.device("cuda"))
    assert all(numbers[key] <= bound for key, bound in bounds.items()), numbers
"""


def tasks(device: torch.device, deadline: float) -> Iterator[tuple[str, partial[list[Result]]]]:
    """One a tool."""
    for tool in TOOLS:
        yield f"sanitizer, {tool}", partial(sanitized, tool, device, deadline)


def sanitized(tool: str, device: torch.device, deadline: float) -> list[Result]:
    name, binary = f"sanitizer, {tool}", shutil.which("compute-sanitizer")
    lacking = what_lacks(device, binary)
    if lacking or binary is None:
        return [not_run(name, lacking)]
    chosen = ["--kernel-regex", "kns=logits_policy_loss", "--report-api-errors", "no"]
    command = [binary, "--tool", tool, *chosen, "--error-exitcode", "9"]
    timeout_s = max(1.0, min(TIMEOUT_S, deadline - time.monotonic()))
    try:
        done = subprocess.run(
            [*command, sys.executable, "-c", PROGRAM],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # or it owns what surrounds
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return [not_run(name, f"not done in {timeout_s:.0f} s")]
    said = (done.stdout + done.stderr).strip().splitlines() or [""]
    if "not supported" in " ".join(said):
        return [not_run(name, "compute-sanitizer does not know this device")]
    status = "fail" if done.returncode else "pass"
    return [Result(name=name, status=status, reason=said[-1][:300] if done.returncode else "")]


def what_lacks(device: torch.device, binary: str | None) -> str:
    """Nothing: an empty text."""
    if device.type != "cuda":
        return "no GPU"
    if binary is None:
        return "no compute-sanitizer"
    if logits_policy_loss.library_for(torch.empty(1, 1, device=device)) is None:
        return "no CUDA kernel: no nvcc that builds it, or no clusters of blocks"
    return ""

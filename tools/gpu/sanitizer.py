"""Does the CUDA kernel touch what is not its own, or race?   compute-sanitizer, in a process"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

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


def tasks(device: torch.device) -> Iterator[tuple[str, partial[list[Result]]]]:
    """One a tool."""
    for tool in TOOLS:
        yield f"sanitizer, {tool}", partial(sanitized, tool, device)


def sanitized(tool: str, device: torch.device) -> list[Result]:
    name, binary = f"sanitizer, {tool}", shutil.which("compute-sanitizer")
    if device.type != "cuda" or binary is None:
        return [not_run(name, "no GPU" if device.type != "cuda" else "no compute-sanitizer")]
    command = [binary, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [not_run(name, f"not done in {TIMEOUT_S} s")]
    said = (done.stdout + done.stderr).strip().splitlines() or [""]
    if "not supported" in " ".join(said):
        return [not_run(name, "compute-sanitizer does not know this device")]
    status = "fail" if done.returncode else "pass"
    return [Result(name=name, status=status, reason=said[-1][:300] if done.returncode else "")]

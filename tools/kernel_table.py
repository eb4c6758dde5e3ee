"""What do the kernels take of a GPU, and does any spill?   compiled for three kinds, without one

    python tools/kernel_table.py [--out benchmarks/kernels.md]

Every launch that the package can make is recorded from the functions that make it, on a CPU and
without running anything, so types, constants and warps are those of the launch; compiled once with
what Triton finds out about divisibility and once without; and disassembled. CUDA sources are
compiled by nvcc, if it is there, for sm_90a and sm_100a. Writes the sections of this Triton's and
this nvcc's version, and leaves those of others as they are. Exit code 1: something spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megatron_srpo.kernels import (
    group_advantage_triton,
    logits_policy_loss,
    logprob_stats_triton,
    nvcc,
    policy_loss_triton,
    rows_triton,
)
from megatron_srpo.kernels.policy_loss import TOTALS

MODULES = (rows_triton, logprob_stats_triton, policy_loss_triton, group_advantage_triton)
ARCHITECTURES = (80, 90, 100)
CUDA_ARCHITECTURES = ("90a", "100a")
TIMEOUT_S = 120
UNSPECIALIZED = ", nothing known of divisibility"
TABLE = Path(__file__).parents[1] / "benchmarks" / "kernels.md"
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    kernel: Any
    values: dict[str, Any]
    """Name of a parameter -> tensor, number, None or what it is specialized for."""
    num_warps: int

    @property
    def name(self) -> str:
        """The kernel's, and what distinguishes this launch from others of it."""
        pointers = [v for v in self.values.values() if isinstance(v, Tensor)]
        dtypes = ", ".join(
            f"{n.removesuffix('_ptr')} {TYPES[v.dtype][1:]}"
            for n, v in self.values.items()
            if isinstance(v, Tensor) and v.dtype.is_floating_point and v.dtype != torch.float32
        )
        chosen = ", ".join(n for n, v in self.values.items() if v is True)
        absent = ", ".join(
            f"no {n.removesuffix('_ptr')}" for n, v in self.values.items() if v is None
        )
        assert pointers, "a kernel without memory"
        file = self.kernel.fn.__module__.rpartition(".")[2]
        details = "; ".join(filter(None, (dtypes, chosen, absent)))
        return f"{file}.{self.kernel.fn.__name__.strip('_')}" + (f" ({details})" if details else "")

    def source(self, *, specialized: bool) -> ASTSource:
        """As Triton would compile it; pointers and numbers that 16 divides are known to it."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        is_constant = {p.name for p in self.kernel.params if p.is_constexpr}
        for place, (name, value) in enumerate(self.values.items()):
            if name in is_constant or value is None:
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = type_of(value)
            number = value.data_ptr() if isinstance(value, Tensor) else value
            if specialized and isinstance(number, int) and number % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
        return ASTSource(
            fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    registers: int
    shared_bytes: int
    spilled: int
    """Bytes of stack, and instructions that go there."""

    def __str__(self) -> str:
        spilled = f", SPILLS {self.spilled}" if self.spilled else ""
        return f"{self.registers}, {self.shared_bytes} B{spilled}"


def type_of(value: Any) -> str:
    """Triton's name for what a launch hands over."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


# --- launches ---


def launches() -> list[Launch]:
    """All that differ, by name."""
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in set(kwargs) - set(kernel.arg_names)}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        values = {name: values[name] for name in kernel.arg_names}
        found.append(Launch(kernel=kernel, values=values, num_warps=options.get("num_warps", 4)))

    with mock.patch.object(JITFunction, "run", record):
        launch_everything()
    return list({launch.name: launch for launch in found}.values())


def launch_everything() -> None:
    """Each function that launches a kernel, in each way that compiles another one."""
    num_rows, vocab = 32, 1024
    row_N = torch.zeros(num_rows)
    row_ids_N = row_N.long()
    stats, softmax, outputs = torch.zeros(4, num_rows), torch.zeros(3, num_rows), torch.zeros(2, 32)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(num_rows, vocab, dtype=dtype)
        rows_triton.absorb_chosen(stats, logits, row_ids_N, row_ids_N, row_N)
        logprob_stats_triton.gradients(
            logits, row_ids_N, row_ids_N, row_N, softmax, outputs, num_real=vocab
        )
        fp32_logits = torch.zeros(num_rows, vocab)
        rows_triton.absorb(stats, fp32_logits, row_ids_N, row_N)
        rows_triton.gradients(fp32_logits, row_ids_N, row_N, softmax, outputs, dtype)
    rows_triton.concluded(stats[None], row_N)
    totals_K = torch.zeros(len(TOTALS), dtype=torch.float64)
    for surrogate, importance, other in (
        ("reinforce", "none", None),
        ("ppo", "token_truncate", row_N),
        ("ppo", "sequence_mask", row_N),
    ):
        policy_loss_triton.policy_loss(
            *(
                totals_K,
                row_N,
                row_N,
                row_N,
                row_N,
                other,
                other,
                torch.zeros(3, dtype=torch.int32),
            ),
            *(surrogate, importance, 0.2, 0.2, 0.1, 2.0, 7.0),
        )
    for dtype, baseline, std in (
        (torch.float32, "mean", "population"),
        (torch.float64, "leave_one_out", "sample"),
        (torch.float32, "mean", "none"),
    ):
        group_advantage_triton.group_advantage(
            torch.zeros(32, dtype=dtype), torch.tensor([0, 16, 32]), baseline, std
        )


def never_launched(found: list[Launch]) -> set[str]:
    """Kernels of the package that no launch has compiled, neither themselves nor within others."""
    everything = {k.fn.__name__: k for m in MODULES for k in vars(m).values() if is_kernel(k)}
    called = {word for k in everything.values() for word in re.findall(r"\w+(?=\()", body(k))}
    return set(everything) - called - {launch.kernel.fn.__name__ for launch in found}


def is_kernel(value: Any) -> bool:
    """Of the package: Triton's own library is made of such functions too."""
    return isinstance(value, JITFunction) and value.fn.__module__.startswith("megatron_srpo")


def body(kernel: Any) -> str:
    """Source without the line that names it."""
    return kernel.src.partition(":\n")[2]


# --- compilation ---


def compiled(wanted: Sequence[tuple[Launch, int, bool]]) -> Iterator[Usage]:
    """Of a launch on an architecture, with or without what is known of divisibility. Raises
    `TimeoutError`, and `RuntimeError` if one cannot be compiled: what is wrong is on stderr."""
    context = get_context("fork")  # nothing that Triton's compiler does can be interrupted
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=compile_all, args=(wanted, sender))
    process.start()
    sender.close()
    try:
        for launch, capability, _ in wanted:
            if not receiver.poll(TIMEOUT_S):
                raise TimeoutError(f"{launch.name}, sm_{capability}: over {TIMEOUT_S} s")
            yield receiver.recv()
    except EOFError:
        raise RuntimeError(f"{launch.name}, sm_{capability}: not compiled") from None
    finally:
        process.kill()
        process.join()


def compile_all(wanted: Sequence[tuple[Launch, int, bool]], sender: Any) -> None:
    """In a process of its own: sends a `Usage` for each."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # what 3.9 does, and warns of
    for launch, capability, specialized in wanted:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            result = triton.compile(
                launch.source(specialized=specialized),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": launch.num_warps},
            )
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(result.asm["cubin"])
            ((_, usage),) = usages(binary)
        sender.send(replace(usage, shared_bytes=result.metadata.shared))


def usages(binary: Path) -> Iterator[tuple[str, Usage]]:
    """Of each function in it."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(binary)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assembly = re.split(r"Function : (\S+)", said)
    code = dict(zip(assembly[1::2], assembly[2::2], strict=True))
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, said):
        num_moves = len(re.findall(r"\b(?:STL|LDL)\b", code[name]))
        spilled = int(stack) + int(local) + num_moves
        yield name, Usage(registers=int(registers), shared_bytes=int(shared), spilled=spilled)


def triton_table() -> tuple[str, dict[str, list[str]]]:
    """Heading, and for each launch a cell an architecture."""
    found = launches()
    assert not never_launched(found), f"not in the table: {never_launched(found)}"
    wanted = [
        (launch, capability, specialized)
        for launch in found
        for specialized in (True, False)
        for capability in ARCHITECTURES
    ]
    rows: dict[str, list[str]] = {}
    for (launch, _, specialized), usage in zip(wanted, compiled(wanted), strict=True):
        name = launch.name + ("" if specialized else UNSPECIALIZED)
        rows.setdefault(name, []).append(str(usage))
    return f"Triton {triton.__version__}", rows


def cuda_table() -> tuple[str, dict[str, list[str]]] | None:
    """None without nvcc."""
    compiler = nvcc.find_nvcc()
    if compiler is None:
        return None
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"V([\d.]+)", said.stdout)
    assert version, said.stdout
    rows: dict[str, list[str]] = {}
    for arch in CUDA_ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            library = nvcc.build(logits_policy_loss.SOURCE, arch, compiler, Path(folder))
            for name, usage in sorted(usages(library)):
                rows.setdefault(readable(name), []).append(str(usage))
    return f"nvcc {version[1]}", rows


def readable(symbol: str) -> str:
    """`_Z5scaleIfEvPT_PKfl`: scale, fp32"""
    found = re.match(r"_Z\d+(\w+?)I(f|13__nv_bfloat16)E", symbol)
    assert found, symbol
    return f"{found[1]} ({'fp32' if found[2] == 'f' else 'bf16'})"


# --- the table ---


def section(heading: str, architectures: tuple[Any, ...], rows: dict[str, list[str]]) -> str:
    """Markdown."""
    head = ["kernel", *(f"sm_{a}" for a in architectures)]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return f"## {heading}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written(text: str, sections: list[str]) -> str:
    """The table with these sections in place of those with the same headings."""
    introduction, *known = text.split("\n## ")
    by_heading = {one.partition("\n")[0]: one.strip() for one in known}
    by_heading |= {one[3:].partition("\n")[0]: one[3:].strip() for one in sections}
    parts = [introduction.strip(), *(by_heading[heading] for heading in sorted(by_heading))]
    return "\n\n## ".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers and shared memory of every kernel.")
    parser.add_argument("--out", type=Path, default=TABLE)
    out = parser.parse_args().out
    heading, rows = triton_table()
    sections = [section(heading, ARCHITECTURES, rows)]
    cuda = cuda_table()
    if cuda:
        sections.append(section(cuda[0], CUDA_ARCHITECTURES, cuda[1]))
    out.write_text(written(out.read_text() if out.exists() else "# Kernels\n", sections))
    spilled = [one for one in sections if "SPILLS" in one]
    print(f"{out}: {heading}" + (f", {cuda[0]}" if cuda else ", no nvcc"))
    sys.exit("something spills" if spilled else 0)


if __name__ == "__main__":
    main()

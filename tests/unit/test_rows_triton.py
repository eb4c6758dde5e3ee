"""The source of the GPU's functions: run by Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_srpo.kernels import rows_triton

HERE = Path(__file__).parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"targets_ptr": "*i64", "rows_ptr": "*i64"} | dict.fromkeys(
    ("num_rows", "num_columns", "row_stride"), "i32"
)


def test_the_triton_functions_are_those_of_torch():
    pytest_alone = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_alone, HERE / "interpreted_rows.py", HERE / "interpreted_ops.py"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("kernel", "changed"),
    [(rows_triton._absorb, {}), (rows_triton._gradients, {"out_ptr": "*bf16"})],
    ids=["absorb", "gradients"],
)
def test_the_kernels_compile_and_keep_everything_in_registers(
    kernel: Any,
    changed: dict[str, str],
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    types = {name: (TYPES | changed).get(name, "*fp32") for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs={}),
        target=GPUTarget("cuda", capability, 32),
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    said = subprocess.run(
        [CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    assert used, said
    print(f"\nsm_{capability} {kernel.__name__}: {used[0]}")
    assert used[2] == "0", "registers are spilled to the stack"

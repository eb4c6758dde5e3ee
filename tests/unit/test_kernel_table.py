"""Every kernel compiles for every GPU without spilling, and the committed table has all of them."""

from __future__ import annotations

import re

import pytest
import triton

from megatron_srpo.kernels import nvcc
from tools import kernel_table as tool

TEXT = tool.TABLE.read_text()
TRITON = f"Triton {triton.__version__}"


def rows_of(heading: str) -> dict[str, list[str]]:
    """Of a section of the committed table."""
    (section,) = (s for s in TEXT.split("\n## ") if s.startswith(f"{heading}\n"))
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if "|" in line]
    return {name: cells for name, *cells in lines[2:]}


def test_every_kernel_has_a_launch_that_is_compiled():
    found = tool.launches()
    assert tool.never_launched(found) == set()
    assert tool.never_launched(found[1:3]) >= {"_policy_loss", "_group_advantage"}


def test_every_launch_compiles_for_every_gpu_and_keeps_everything_in_registers():
    found = tool.launches()
    wanted = [(launch, capability, True) for launch in found for capability in tool.ARCHITECTURES]
    usages = list(tool.compiled(wanted))
    spilling = [
        f"{launch.name}, sm_{capability}"
        for (launch, capability, _), usage in zip(wanted, usages, strict=True)
        if usage.spilled
    ]
    assert spilling == []


@pytest.mark.parametrize("heading", re.findall(r"^## (Triton .*)$", TEXT, re.MULTILINE))
def test_the_table_has_every_launch_and_no_spill(heading: str):
    names = {launch.name for launch in tool.launches()}
    both = names | {name + tool.UNSPECIALIZED for name in names}
    rows = rows_of(heading)
    assert set(rows) == both
    assert all(len(cells) == len(tool.ARCHITECTURES) for cells in rows.values())
    assert not any("SPILLS" in cell for cells in rows.values() for cell in cells)


def test_the_table_speaks_of_the_triton_of_gpus_and_of_nvcc():
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert "Triton 3.6.0" in headings and any(h.startswith("nvcc 13.") for h in headings)


def test_a_kernel_that_cannot_be_compiled_is_named():
    launch = tool.launches()[0]
    broken = dict.fromkeys(launch.values)
    nonsense = tool.Launch(kernel=launch.kernel, values=launch.values | broken, num_warps=4)
    with pytest.raises((RuntimeError, AssertionError)):
        list(tool.compiled([(nonsense, 90, True)]))


def test_a_section_takes_the_place_of_the_one_with_its_heading():
    first = tool.written("# K\n", [tool.section("A", (90,), {"k": ["1"]})])
    assert tool.written(first, [tool.section("A", (90,), {"k": ["1"]})]) == first
    both = tool.written(first, [tool.section("B", (90,), {"k": ["2"]})])
    assert both.count("## ") == 2 and both.startswith(first.strip())
    assert "| k | 3 |" in tool.written(both, [tool.section("A", (90,), {"k": ["3"]})])


@pytest.mark.slow
def test_nvcc_compiles_the_cuda_sources_without_spills():
    if nvcc.find_nvcc() is None:
        pytest.skip("nvcc is not there")
    found = tool.cuda_table()
    assert found
    rows = found[1]
    assert rows and not any("SPILLS" in cell for cells in rows.values() for cell in cells)

"""The GPU's functions in Triton's interpreter; `test_kernel_table.py` compiles them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


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

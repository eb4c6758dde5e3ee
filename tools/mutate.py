"""Do the unit tests notice when the algorithm is wrong?   mutations -> table of caught and survived

    python tools/mutate.py [--only NAME] [--jobs N]

Each mutation (`mutations.py`) is a mistake that somebody could make: an exact piece of source, what
stands there instead, and what is wrong then. Package, tools and unit tests are copied to a
temporary folder, one mutation is applied at a time, and the tests that mirror its file are run,
then those of the whole algorithm. Tests that are red without any mutation are named and left out.
Exit code 1 if fewer than 90 % are caught, or if a piece of source is not found exactly once (the
source has moved on: mend the list).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
LEAST_CAUGHT = 0.9
ALGORITHM = (
    "algorithm", "draws", "restarts", "rollouts", "resets", "localize", "thoughts", "advantages",
    "metrics", "types",
)  # fmt: skip
"""Files that every step goes through."""
TESTED_TOGETHER = {
    "prepare_sets": ("types",),
    "prepare_data": ("types",),
    "policy_loss": ("loss",),
    "linear_logprob": ("products",),
    "rewards": ("exact", "boxed_words"),
    "choice": ("boxed_words",),
    "process": ("judge", "verdict", "worker", "workers"),
    "workers": ("judge", "process", "worker"),
    "sandbox": ("root_folder", "supervise", "inside", "namespaces"),
    "code": ("output", "prelude"),
    "backend": ("config_precision",),
    "colocation": ("turns", "memory"),
    "restarts": ("draws", "algorithm"),
}
"""Tests: files that they mirror, beside the one of their name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the tests said of one mutation."""

    mutation: Mutation
    failed_test: str | None
    """The first test that failed; None: the mutation survived."""
    seconds: float


def copy_project(folder: Path) -> Path:
    """Package, tools and unit tests, docs and examples that tests compare with."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=skipped)
    for name in ("docs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    shutil.copytree(ROOT / "megatron_srpo", folder / "megatron_srpo", ignore=skipped)
    shutil.copytree(ROOT / "tests" / "unit", folder / "tests" / "unit", ignore=skipped)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/tiny.py"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def tests_of(file: str) -> list[str]:
    """The file's own tests first, then the whole algorithm's where it goes through that file."""
    own = Path(file).stem
    names = [own, "algorithm", "cases", "rollouts"] if own in ALGORITHM else [own]
    if file.startswith("engines/megatron/"):
        names += ["families", "convert"]
    for folder, tests in (("report/", "report"), ("profile/", "profile")):
        if file.startswith(folder):
            names = [tests]
    if file.startswith("plan/"):
        names = ["plan", "plan_tokens"]
    if file.startswith("../tools/prepare"):
        names = ["prepare_data", "prepare_sets"]
    names += [tests for tests, files in TESTED_TOGETHER.items() if own in files]
    if own.endswith("_triton"):
        names += ["rows_triton"]
    paths = [f"tests/unit/test_{name}.py" for name in dict.fromkeys(names)]
    return [path for path in paths if (ROOT / path).is_file()]


def run_tests(folder: Path, tests: Sequence[str], *options: str) -> list[str]:
    """Ids of failed tests, or what stopped pytest."""
    try:
        done = pytest_in(folder, *options, *tests)
    except subprocess.TimeoutExpired:
        return ["pytest did not come to an end"]
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed or ([f"pytest ended with {done.returncode}"] if done.returncode else [])


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=no", "-rfE", "-pno:cacheprovider", *arguments],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def judge(mutation: Mutation, red: Sequence[str]) -> Outcome:
    """Apply one mutation to a fresh copy and run its tests up to the first failure."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = copy_project(Path(name))
        path = folder / "megatron_srpo" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        deselected = [f"--deselect={test}" for test in red]
        failed = run_tests(folder, tests_of(mutation.file), "-x", *deselected)
    return Outcome(
        mutation=mutation,
        failed_test=failed[0].rpartition("::")[2] if failed else None,
        seconds=time.perf_counter() - began,
    )


def stale(mutations: Sequence[Mutation]) -> list[str]:
    """Mutations whose `old` is not in the source exactly once."""
    counts = {m.name: (ROOT / "megatron_srpo" / m.file).read_text().count(m.old) for m in mutations}
    return [f"{name}: found {count} times" for name, count in counts.items() if count != 1]


def report(outcome: Outcome) -> str:
    m, test = outcome.mutation, outcome.failed_test
    verdict = f"caught    {test}" if test else f"SURVIVED  {m.wrong}"
    return f"{m.file:<14}{m.name:<28}{outcome.seconds:5.1f} s  {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", metavar="NAME", help="mutations whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time")
    arguments = parser.parse_args()
    wanted = arguments.only or ""
    mutations = [m for m in MUTATIONS if wanted in m.name or wanted in m.file]
    if not mutations:
        parser.error(f"no mutation is named like {wanted!r}")
    if moved := stale(mutations):
        print("stale mutations, mend the list:", *moved, sep="\n  ")
        return 1

    began = time.perf_counter()
    tests = sorted({test for m in mutations for test in tests_of(m.file)})
    with tempfile.TemporaryDirectory() as name:
        red = run_tests(copy_project(Path(name)), tests)
    for test in red:
        print(f"red without a mutation, left out: {test}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = []
        for outcome in pool.map(lambda m: judge(m, red), mutations):
            print(report(outcome), flush=True)
            outcomes.append(outcome)
    num_caught = sum(outcome.failed_test is not None for outcome in outcomes)
    seconds = time.perf_counter() - began
    print(f"{num_caught} of {len(outcomes)} mutations caught in {seconds:.0f} s")
    return 0 if num_caught >= LEAST_CAUGHT * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

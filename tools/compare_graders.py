"""What do the two math graders make of hand-made pairs of answers?   -> benchmarks/graders.md

    python -m tools.compare_graders

Grades all pairs of tests/unit/math_pairs.tsv, writes into that table what each grader says (a unit
test expects it), and right and wrong verdicts per trap, the wrongly accepted pairs and seconds into
benchmarks/graders.md.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.unit.math_pairs import GRADERS, Pair, pairs, said, write

REPORT = Path(__file__).resolve().parents[1] / "benchmarks" / "graders.md"
VERDICTS = {
    "right accept": ("yes", "yes"),
    "right reject": ("no", "no"),
    "false accept": ("no", "yes"),
    "false reject": ("yes", "no"),
}
"""(truth, what the grader says)"""


def graded(table: list[Pair], grader: str) -> tuple[list[Pair], list[float]]:
    """The table with the grader's column filled in, and CPU seconds per pair."""
    filled: list[Pair] = []
    seconds: list[float] = []
    for pair in table:
        began = time.process_time()
        verdict = said(grader, pair)
        seconds.append(time.process_time() - began)
        filled.append(replace(pair, **{grader: verdict}))
    return filled, seconds


def counts(table: list[Pair], grader: str) -> list[int]:
    """Of each verdict, and without one."""
    seen = Counter((pair.equal, getattr(pair, grader)) for pair in table)
    known = [seen[verdict] for verdict in VERDICTS.values()]
    return [*known, len(table) - sum(known)]


def rows(table: list[Pair]) -> list[str]:
    traps = dict.fromkeys(pair.trap for pair in table)
    parts = {trap: [pair for pair in table if pair.trap == trap] for trap in traps}
    return [
        f"| {name} | {len(part)} | "
        + " | ".join(" / ".join(map(str, counts(part, grader))) for grader in GRADERS)
        + " |"
        for name, part in [*parts.items(), ("**all**", table)]
    ]


def timing(grader: str, table: list[Pair], seconds: list[float]) -> str:
    """Without the pairs that are made to take long."""
    usual = [s * 1e3 for pair, s in zip(table, seconds, strict=True) if pair.trap != "huge"]
    return (
        f"| {grader} | {statistics.median(usual):.2g} | {statistics.mean(usual):.2g} "
        f"| {max(usual):.3g} | {max(seconds) * 1e3:.4g} |"
    )


def import_ms(module: str) -> float:
    """Median of five fresh processes, beyond what the package's nouns take."""
    program = (
        "import time, megatron_srpo.rewards; t = time.process_time();"
        f"import {module}; print(1e3 * (time.process_time() - t))"
    )
    run = [sys.executable, "-c", program]
    return statistics.median(float(subprocess.check_output(run)) for _ in range(5))


def wrongly_accepted(table: list[Pair], grader: str) -> list[str]:
    return [
        f"| {grader} | {pair.trap} | `{pair.gold}` | `{pair.answer}` |"
        for pair in table
        if (pair.equal, getattr(pair, grader)) == ("no", "yes")
    ]


def main() -> None:
    table, seconds = pairs(), {}
    for grader in GRADERS:
        table, seconds[grader] = graded(table, grader)
    write(table)
    equal = sum(pair.equal == "yes" for pair in table)
    agreed = sum(pair.math_verify == pair.math_string for pair in table)
    REPORT.write_text(
        "\n".join(
            [
                "# Math graders",
                "",
                f"`python -m tools.compare_graders`: {len(table)} hand-made pairs of a right "
                f"answer and a response's, {equal} of them equal. The pairs are traps: their "
                "shares are no rates on a data set.",
                "",
                "Right accept / right reject / false accept / false reject / no verdict. "
                f"The graders say the same of {agreed} of {len(table)} pairs.",
                "",
                "| trap | pairs | " + " | ".join(GRADERS) + " |",
                "|---|---|---|---|",
                *rows(table),
                "",
                "Milliseconds of a core per pair, no answer seen before "
                f"({platform.machine()}, Python {platform.python_version()}):",
                "",
                "| grader | median | mean | slowest | slowest of the pairs made to take long |",
                "|---|---|---|---|---|",
                *(timing(grader, table, seconds[grader]) for grader in GRADERS),
                "",
                "Import of `megatron_srpo.rewards.math_verify` (sympy, the parser): "
                f"{import_ms('megatron_srpo.rewards.math_verify'):.0f} ms.",
                "",
                "Wrongly accepted:",
                "",
                "| grader | trap | right answer | accepted |",
                "|---|---|---|---|",
                *(line for grader in GRADERS for line in wrongly_accepted(table, grader)),
                "",
            ]
        )
    )
    print(REPORT.read_text())


if __name__ == "__main__":
    main()

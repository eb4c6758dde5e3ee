"""The list of mistakes keeps up with the source."""

from __future__ import annotations

from pathlib import Path

from tools.mutations import MUTATIONS

PACKAGE = Path(__file__).parents[2] / "megatron_srpo"


def test_what_a_mutation_changes_stands_exactly_once_in_its_file():
    counts = {m.name: (PACKAGE / m.file).read_text("utf-8").count(m.old) for m in MUTATIONS}
    assert len(counts) == len(MUTATIONS), "two mutations have one name"
    assert not {name: count for name, count in counts.items() if count != 1}

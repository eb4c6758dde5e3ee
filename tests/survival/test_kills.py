"""Whatever is killed, and when: the same command again ends as a run that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.survival.kills import Kill
from tests.survival.matrix import LAYOUTS, PHASES, Ground, kill_all, table


def test_six_kills_of_one_rank_or_of_all(ground: Ground) -> None:
    kills = [
        Kill(phase="generate", occurrence=2, fraction=0.5, victim=1),
        Kill(phase="journal", occurrence=2, fraction=0.3, victim=1),
        Kill(phase="checkpoint", occurrence=1, fraction=0.5, victim=None),
        Kill(phase="train", occurrence=2, fraction=0.5, victim=None),
        Kill(phase="sync", occurrence=2, fraction=0.5, victim=0),
        Kill(phase="export", occurrence=1, fraction=0.5, victim=None),
    ]
    hit: list[str] = []
    for run, hits, wrong in ground.kill_until_hit(kills):
        for each in hits:
            print(f"run {run}: {each.wanted}: hit {each.phases}, others: {each.others}")
        assert not wrong
        hit += [each.wanted for each in hits]
    assert hit == [kill.phase for kill in kills]


@pytest.mark.slow
def test_sixty_kills_in_every_phase_on_every_layout(ground: Ground, tmp_path: Path) -> None:
    grounds = [ground]
    for name in LAYOUTS.keys() - {ground.name}:
        folder = tmp_path / name
        folder.mkdir()
        grounds.append(Ground(name, folder, ground.config))
    found = kill_all(grounds, 60, seed=0)
    print(f"\n{table(found)}")
    assert len(found) >= 60
    assert [row for row in found if row["wrong"]] == []
    assert {*PHASES} <= {row["phase"] for row in found}

"""The studies' own runs: equal to the command line's, and what of the claims is robust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import start
from tools import claims
from tools.studies import plan
from tools.studies.analysis import correction, merged
from tools.studies.comparison import runs_of, token_difference
from tools.studies.regimes import CONFIG, REGIMES
from tools.studies.runs import PASS
from tools.studies.store import Store
from tools.studies.table import QUICK, QUICK_SEEDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What `python tools/claims.py --quick` makes, by that command's own function."""
    folder = tmp_path_factory.mktemp("quick")
    print(claims.quick(Store(claims.FOLDER), folder, num_processes=2))
    return Store(folder)


def test_srpo_is_above_rrpo_in_paired_mean(quick: Store) -> None:
    rate = plan.best_lr("h8", Store(claims.FOLDER))
    by = runs_of(QUICK, "h8", QUICK_SEEDS, quick, rate)
    gap = token_difference(by, "srpo", "rrpo", "h8")
    assert gap is not None and gap.num == len(QUICK_SEEDS) and gap.mean > 0


def test_clean_prefixes_correct_more_often_than_erroneous_ones(quick: Store) -> None:
    found = correction(merged(record.depth for record in quick.records))
    assert found is not None
    assert found.clean > found.erroneous and found.stratified > 0


def test_a_study_s_run_is_the_command_line_s(quick: Store, tmp_path: Path) -> None:
    """Made by a process that has served other runs, against a process of its own."""
    record = [record for record in quick.records if record.job.seed == QUICK_SEEDS[-1]][-1]
    end = ["num_steps", "max_logprob_diff", "run_dir"]
    settings = dict(zip(end, (record.step[-1], 0.01, tmp_path / "run"), strict=True))
    words = [f"{key}={value}" for key, value in settings.items()]
    words += [*REGIMES["h8"].overrides, *record.job.settings, f"seed={record.job.seed}"]
    command = start("train", CONFIG, *words)
    said, _ = command.communicate(timeout=300)
    assert command.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if PASS in line] == record.step
    assert [round(line[PASS], 4) for line in lines if PASS in line] == record.passed
    kinds = {name: sum(line.get(f"tokens/{name}", 0) for line in lines) for name in record.kinds}
    assert kinds == record.kinds

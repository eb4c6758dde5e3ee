"""The table of an evaluation: means by hand, intervals that cover, what files hold."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_srpo.eval_table import interval, shown, table, write_tables
from megatron_srpo.evaluate import Attempt, attempt_sums
from megatron_srpo.metrics import combine
from megatron_srpo.types import Score
from tests.unit.builders import config

SETS = {"sets": {"one": {"data": "one.jsonl"}, "two_b": {"data": "two.jsonl"}}}


def attempts(set: str, id: str, *seeds: str, greedy: str = "") -> list[Attempt]:
    """A text a seed, a letter a response: + right, - wrong, ? the reward failed."""

    def one(verdict: str, seed: int | None, index: int) -> Attempt:
        return Attempt(
            set=set,
            prompt_id=id,
            seed=seed,
            index=index,
            text="",
            score=Score(
                value=0.0, correct=verdict == "+", failure="broken" if verdict == "?" else None
            ),
            num_tokens=4,
            finish_reason="stop",
        )

    drawn = [one(v, s, i) for s, verdicts in enumerate(seeds) for i, v in enumerate(verdicts)]
    return [*(one(verdict, None, 0) for verdict in greedy), *drawn]


def rows(found: list[Attempt], **eval: Any) -> dict[str, dict[str, float]]:
    cfg = config(eval=SETS | eval)
    return {
        str(name): {k: v for k, v in row.items() if not math.isnan(v)}
        for name, row in table(found, cfg).to_dict(orient="index").items()
    }


TWO_SETS = [
    *attempts("one", "a", "++", "+-", greedy="+"),
    *attempts("one", "b", "--", "+-", greedy="-"),
    *attempts("two_b", "c", "++", "--", greedy="+"),
    *attempts("two_b", "d", "--", "-+", greedy="+"),
]


def test_a_row_holds_means_over_problems_and_seeds_and_their_accuracy_by_hand():
    found = rows(TWO_SETS, num_samples=2, num_seeds=2, pass_at=[1, 2], greedy=True)
    one = found["one"]
    assert (one["num_problems"], one["num_responses"]) == (2, 10)
    assert one["greedy"] == 0.5
    assert one["pass_at_1"] == pytest.approx((1 + 1 / 2 + 0 + 1 / 2) / 4)
    assert one["pass_at_2"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    # Seeds: means .5 and .5; problems: means .75 and .25.
    assert one["pass_at_1_ci95"] == pytest.approx(0.0)
    assert one["pass_at_1_stderr"] == pytest.approx(0.25)
    # Seeds: .5 and 1; t of one degree of freedom is 12.7062.
    assert one["pass_at_2_ci95"] == pytest.approx(12.7062047 * 0.25)
    assert one["greedy_stderr"] == pytest.approx(0.5)
    assert "greedy_ci95" not in one  # there is one greedy response


def test_the_last_row_is_the_mean_over_sets_with_an_interval_over_seeds():
    found = rows(TWO_SETS, num_samples=2, num_seeds=2, greedy=True)
    assert [*found] == ["one", "two_b", "mean"]
    mean = found["mean"]
    assert mean["greedy"] == pytest.approx((0.5 + 1.0) / 2)
    assert mean["pass_at_1"] == pytest.approx((0.5 + 0.375) / 2)
    # Seeds: (.5 + .5) / 2 and (.5 + .25) / 2.
    assert mean["pass_at_1_ci95"] == pytest.approx(12.7062047 * 0.125 / 2)
    assert mean["num_problems"] == 4


def test_of_one_set_there_is_no_mean_over_sets_and_of_one_seed_no_interval():
    cfg = config(eval={"sets": {"one": {"data": "one.jsonl"}}})
    (row,) = table(attempts("one", "a", "+"), cfg).to_dict(orient="index").values()
    assert "pass_at_1_ci95" not in row and "pass_at_1_stderr" not in row
    assert row["pass_at_1"] == 1.0


def test_a_set_without_a_verdict_has_no_rate_and_the_mean_leaves_the_metric_out():
    found = rows([*attempts("one", "a", "?"), *attempts("two_b", "c", "+")])
    assert "pass_at_1" not in found["one"] and found["one"]["failure_rate"] == 1.0
    assert found["two_b"]["pass_at_1"] == 1.0
    assert "pass_at_1" not in found["mean"]


def test_the_numbers_are_those_of_an_evaluation_in_training():
    cfg = config(eval=SETS | {"num_samples": 2, "num_seeds": 2, "pass_at": [1, 2], "greedy": True})
    metrics = combine([attempt_sums(TWO_SETS, cfg)])
    found = table(TWO_SETS, cfg)
    assert metrics == {
        f"eval/{name}/{metric}": found.loc[name, metric]
        for name in ("one", "two_b")
        for metric in ("greedy", "pass_at_1", "pass_at_2", "response_tokens_mean",
                       "truncated_rate", "failure_rate")
    }  # fmt: skip


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_95_of_100_intervals_hold_the_policys_true_chance(num_seeds: int):
    """Problems of very different difficulty, responses drawn as an engine draws them."""
    rng = np.random.default_rng(num_seeds)
    chances = rng.beta(0.5, 0.5, size=40)
    right = rng.random((4000, num_seeds, 40, 2)) < chances[:, None]
    means = right.mean(axis=(2, 3))
    covered = [abs(each.mean() - chances.mean()) <= interval([*each]) for each in means]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_people_see_an_accuracy_beside_what_it_is_of():
    cfg = config(eval=SETS | {"num_samples": 2, "num_seeds": 2, "greedy": True})
    seen = shown(table(TWO_SETS, cfg))
    assert [*seen.columns] == [
        "set", "problems", "responses", "greedy", "pass@1", "failure", "tokens", "truncated"
    ]  # fmt: skip
    row = seen.set_index("set").loc["two_b"]
    assert row["pass@1"] == "0.375 ± 1.588 (0.125)"
    assert row["greedy"] == "1.000 (0.000)"
    assert row["problems"] == "2" and row["tokens"] == "4.0"
    assert seen.set_index("set").loc["mean"]["tokens"] == "-"


def test_json_and_csv_hold_all_numbers_and_latex_compiles_underscores_away(tmp_path: Path):
    cfg = config(eval=SETS | {"num_samples": 2, "num_seeds": 2})
    found = table(TWO_SETS, cfg)
    write_tables(found, tmp_path)
    as_json = json.loads((tmp_path / "table.json").read_text())
    lines = (tmp_path / "table.csv").read_text().splitlines()
    as_csv = {row["set"]: row for row in csv.DictReader(lines)}
    assert [*as_json] == [*as_csv] == ["one", "two_b", "mean"]
    for name, row in found.to_dict(orient="index").items():
        for metric, value in row.items():
            if math.isnan(value):
                assert metric not in as_json[name] and as_csv[name][metric] == ""
            else:
                assert as_json[name][metric] == value == float(as_csv[name][metric])
    tex = (tmp_path / "table.tex").read_text()
    assert tex.startswith(r"\begin{tabular}") and r"two\_b" in tex
    assert "pass@1" in tex and "two_b" not in tex

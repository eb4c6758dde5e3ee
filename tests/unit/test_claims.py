"""The studies' arithmetic, by hand; which runs are made, which seeds chose what, what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_srpo.config_file import load_config
from tools.studies import plan
from tools.studies.analysis import (
    area,
    at_end,
    correction,
    median_ratio,
    merged,
    paired,
    step_area,
    thirds,
    token_area,
    tokens_to,
)
from tools.studies.comparison import runs_of, token_difference
from tools.studies.hypotheses import verdict
from tools.studies.page import write_page
from tools.studies.regimes import CONFIG, REGIMES
from tools.studies.store import Record, Store
from tools.studies.table import (
    ARMS,
    LEARNING_RATES,
    SEEDS,
    STAGES,
    STUDIES,
    TUNED,
    TUNING_SEEDS,
    Stage,
)

BUDGET = REGIMES["h8"].budget


def run(arm: str, seed: int, level: float, lr: str = "0.0003", regime: str = "h8") -> Record:
    """A curve from .1 that comes to `level` half-way and stays there."""
    budget = REGIMES[regime].budget
    return Record(
        job=plan.job(regime, arm, lr, seed),
        step=[0, 20, 40],
        tokens=[0, budget // 2, budget + 500],
        passed=[0.1, level, level],
        base=[0.2, 0.4],
        fresh=[0.1, 0.4],
        suffix=[0.5, None],
        exact=[1.0, 0.5],
        clean=[1.0, 0.75],
        depth={"0": [10, 5, 0, 0], "2": [10, 8, 10, 2]},
        kinds={"base": 60_000, "seed": 0, "replaced": 0, "localize": 500, "suffix": 30_000},
        seconds={"step": 30.0, "eval": 6.0, "generate": 10.0, "train": 5.0},
        length=18.0,
        mismatch=1e-5,
        commit="abc",
    )


def tuned(folder: Path, *, regime: str = "h8", best: str = "0.0003") -> Store:
    """A store whose sweep is done."""
    store = Store(folder)
    for lr in LEARNING_RATES:
        for seed in TUNING_SEEDS[regime]:
            store.add(run(TUNED, seed, 0.8 if lr == best else 0.5, lr=lr, regime=regime))
    return store


# --- curves --------------------------------------------------------------------------------------


def test_an_area_is_the_mean_height_until_its_end():
    xs, ys = [0, 10, 30], [0.0, 1.0, 0.5]
    assert area(xs, ys, 30) == pytest.approx((5 + 15) / 30)
    assert area(xs, ys, 10) == pytest.approx(0.5)
    assert area(xs, ys, 20) == pytest.approx((5 + 10 * (1 + 0.75) / 2) / 20)


def test_an_area_begins_where_its_curve_begins():
    assert area([10, 20], [0.4, 0.6], 20) == pytest.approx(0.5)


def test_a_curve_that_ends_before_the_budget_has_no_area_of_it():
    with pytest.raises(ValueError, match="ends at 30"):
        area([0, 30], [0.0, 1.0], 31)


def test_what_is_generated_beyond_the_budget_does_not_count():
    record = replace(run("grpo", 0, 0.9), tokens=[0, BUDGET, 2 * BUDGET], passed=[0.0, 0.5, 1.0])
    assert token_area(record, BUDGET) == pytest.approx(0.25)
    assert at_end(record, BUDGET) == pytest.approx(0.5)
    assert at_end(record, BUDGET // 2) == pytest.approx(0.25)
    assert step_area(record, 40) == pytest.approx(0.5)


def test_a_threshold_is_reached_between_two_evaluations_or_never():
    record = replace(run("grpo", 0, 0.9), tokens=[0, 100, 200], passed=[0.1, 0.3, 0.7])
    assert tokens_to(record, 0.4) == pytest.approx(125)
    assert tokens_to(record, 0.1) == 0
    assert tokens_to(record, 0.8) == math.inf
    falling = replace(record, passed=[0.5, 0.4, 0.3])
    assert tokens_to(falling, 0.45) == 0


def test_a_ratio_of_never_to_a_number_counts_and_of_never_to_never_does_not():
    never = math.inf
    assert median_ratio([20.0, 30.0, never, never], [10.0, 30.0, 5.0, never]) == 2.0
    assert median_ratio([never], [never]) is None


# --- pairs ---------------------------------------------------------------------------------------


def test_paired_differences_have_student_s_interval_and_exact_tests():
    gap = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert gap is not None
    assert (gap.mean, gap.sd, gap.wins, gap.num) == (2.0, 1.0, 3, 3)
    assert gap.high - gap.mean == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert gap.sign_p == pytest.approx(0.25) and gap.wilcoxon_p == pytest.approx(0.25)


def test_ties_decide_nothing():
    gap = paired([1.0, 1.0], [1.0, 1.0])
    assert gap is not None and (gap.wins, gap.sign_p, gap.wilcoxon_p) == (0, 1.0, 1.0)


def test_one_pair_has_no_interval():
    assert paired([1.0], [0.0]) is None


@pytest.mark.parametrize(
    ("gaps", "margin", "so"),
    [
        ([0.1, 0.11, 0.12], 0.0, "confirmed"),
        ([-0.1, -0.11, -0.12], 0.0, "refuted"),
        ([-0.1, 0.1, 0.12], 0.0, "open"),
        ([-0.01, -0.011, -0.012], -0.02, "confirmed"),
    ],
)
def test_a_claim_is_confirmed_or_refuted_by_the_whole_interval(gaps, margin, so):
    gap = paired(gaps, [0.0] * len(gaps))
    assert gap is not None and verdict(gap, margin) == so


# --- correction ----------------------------------------------------------------------------------


def test_correction_is_compared_at_the_same_depth():
    found = correction({"0": [10, 5, 0, 0], "1": [10, 8, 10, 2], "2": [30, 15, 10, 1]})
    assert found is not None
    assert (found.clean, found.erroneous) == (28 / 50, 3 / 20)
    # weights 5 and 7.5; differences .6 and .4
    assert found.stratified == pytest.approx((5 * 0.6 + 7.5 * 0.4) / 12.5)


def test_depth_alone_makes_no_difference_at_the_same_depth():
    """Deep prefixes are clean here, and deep suffixes are right whatever they continue."""
    found = correction({"1": [10, 2, 90, 18], "7": [90, 72, 10, 8]})
    assert found is not None
    assert found.clean > 2 * found.erroneous and found.stratified == pytest.approx(0.0)


def test_without_suffixes_of_both_kinds_nothing_is_compared():
    assert correction({"0": [10, 5, 0, 0], "1": [0, 0, 4, 1]}) is None


def test_counts_of_runs_add_up_by_depth():
    assert merged([{"10": [1, 1, 0, 0]}, {"2": [1, 0, 1, 1], "10": [2, 1, 0, 0]}]) == {
        "2": [1, 0, 1, 1],
        "10": [3, 2, 0, 0],
    }


def test_thirds_leave_out_what_was_not_measured():
    assert thirds([0.0, 1.0, 1.0, None, 0.5, 0.5]) == [0.5, 1.0, 0.5]
    assert thirds([None, None, None]) == [None, None, None]


# --- store and plan ------------------------------------------------------------------------------


def test_a_run_is_read_back_as_it_was_kept(tmp_path: Path):
    record = run("chain26", 3, 0.7)
    Store(tmp_path).add(record)
    assert Store(tmp_path).get(record.job) == record


def test_what_two_processes_keep_is_there_for_a_third(tmp_path: Path):
    one, other = Store(tmp_path), Store(tmp_path)
    one.add(run("grpo", 0, 0.5))
    other.add(run("srpo", 0, 0.5))
    assert len(Store(tmp_path).records) == 2


def test_a_finished_run_is_not_run_again(tmp_path: Path):
    store = tuned(tmp_path)
    chosen = {"only": ["methods"], "regimes": ["h8"], "seeds": range(1)}
    before = [job for jobs in plan.stages(store, **chosen) for job in jobs]
    store.add(run("grpo", 0, 0.5))
    after = [job for jobs in plan.stages(Store(tmp_path), **chosen) for job in jobs]
    assert run("grpo", 0, 0.5).job in before
    assert after == [job for job in before if job != run("grpo", 0, 0.5).job]


def test_the_learning_rate_is_that_of_the_best_mean_when_the_sweep_is_whole(tmp_path: Path):
    store = tuned(tmp_path / "whole", best="0.0007")
    assert plan.best_lr("h8", store) == "0.0007"
    partial = Store(tmp_path / "partial")
    for lr in LEARNING_RATES:
        partial.add(run(TUNED, TUNING_SEEDS["h8"][0], 0.8, lr=lr))
    assert plan.best_lr("h8", partial) is None
    assert plan.reported(stage("h8", num_arms=1), range(1), partial) == []


def test_a_sweep_comes_before_what_it_decides(tmp_path: Path):
    stages = plan.stages(Store(tmp_path), only=["methods"], regimes=["u8"], seeds=SEEDS)
    first = next(stages)
    assert {job.seed for job in first} == set(TUNING_SEEDS["u8"])
    assert len(first) == len(TUNING_SEEDS["u8"]) * len(LEARNING_RATES)


def test_all_arms_of_a_seed_come_before_the_next_seed(tmp_path: Path):
    tuned(tmp_path)
    jobs = plan.reported(stage("h8", "u8"), range(3), tuned(tmp_path, regime="u8"))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert len(jobs) == 2 * 3 * len(STUDIES["methods"].arms)


def test_seeds_that_chose_report_nothing(tmp_path: Path):
    assert all(not set(SEEDS) & set(seeds) for seeds in TUNING_SEEDS.values())
    with pytest.raises(AssertionError, match="not reported"):
        plan.reported(stage("h8"), range(900, 901), tuned(tmp_path))


def test_a_run_that_two_studies_ask_for_is_made_once(tmp_path: Path):
    store = tuned(tmp_path)
    jobs = [
        job
        for jobs in plan.stages(store, only=[*STUDIES], regimes=["h8"], seeds=SEEDS)
        for job in jobs
        if store.get(job) is None and not store.add(run_of(job))
    ]
    assert len(jobs) == len(set(jobs))


def run_of(job) -> Record:
    return replace(run("grpo", 0, 0.5), job=job)


def stage(*regimes: str, num_arms: int = 99) -> Stage:
    return Stage(study="methods", regimes=regimes, num_arms=num_arms)


def test_every_study_has_its_stages_and_its_baseline():
    for name, study in STUDIES.items():
        assert study.baseline in study.arms and set(study.arms) <= set(ARMS)
        assert any(
            each.study == name and "h8" in each.regimes and each.num_arms >= len(study.arms)
            for each in STAGES
        )
    assert max(each.num_seeds for each in STAGES) <= len(SEEDS)


def test_no_two_arms_are_the_same_run():
    assert len({tuple(sorted(settings)) for settings in ARMS.values()}) == len(ARMS)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_arm_is_a_config_in_every_regime(regime: str):
    for arm in ARMS.values():
        cfg = load_config(CONFIG, [*REGIMES[regime].overrides, *arm])
        assert cfg.algorithm.num_rollouts == 8


# --- page ----------------------------------------------------------------------------------------


def test_the_page_says_what_the_runs_say_and_is_the_same_again(tmp_path: Path):
    store = tuned(tmp_path / "runs")
    for seed in range(4):
        for arm, level in (("grpo", 0.5), ("srpo", 0.6), ("rrpo", 0.4), ("dial 0.5", 0.7)):
            store.add(run(arm, seed, level + 0.01 * seed))
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_page(store, tmp_path / name / "claims.md", tmp_path / name)
        pages.append((tmp_path / name / "claims.md").read_text())
    assert pages[0] == pages[1]
    for file in ("h8.svg", "h8.png", "dial.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    by = runs_of(("srpo", "rrpo"), "h8", SEEDS, store)
    gap = token_difference(by, "srpo", "rrpo", "h8")
    assert gap is not None and gap.mean == pytest.approx(0.2 * 0.75, abs=1e-3)
    (row,) = [line for line in pages[0].splitlines() if line.startswith("| SRPO is above RRPO")]
    assert f"{gap.mean:+.3f}" in row and "4/4" in row and row.endswith("confirmed |")
    assert "Seeds 900, 901, 902 chose the learning rates" in pages[0]


def test_runs_of_tuning_seeds_are_in_no_table(tmp_path: Path):
    store = tuned(tmp_path)
    assert runs_of(["grpo"], "h8", SEEDS, store) == {}


def test_a_study_shows_no_regime_that_it_was_not_made_in(tmp_path: Path):
    """m8's own learning rate may be the one that `slower` is about in h8."""
    store = tuned(tmp_path, regime="m8")
    for arm in ("grpo", "srpo", "chain26"):
        store.add(run(arm, 0, 0.5, regime="m8"))
    write_page(store, tmp_path / "claims.md", tmp_path)
    text = (tmp_path / "claims.md").read_text("utf-8")
    assert STUDIES["methods"].title in text
    assert not [name for name in ("slower", "clip") if STUDIES[name].title in text]

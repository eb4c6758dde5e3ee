"""Which runs, in which order?   stages of the table -> jobs, each once

A stage's jobs are known when the learning rates of its regimes are: sweeps come before it. Within a
stage all arms of a seed come before the next seed, so that a stop leaves whole pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from tools.studies.analysis import token_area
from tools.studies.regimes import REGIMES
from tools.studies.store import Job, Store
from tools.studies.table import (
    ARMS,
    LEARNING_RATES,
    STAGES,
    STUDIES,
    TUNED,
    TUNING_SEEDS,
    Stage,
)


def job(regime: str, arm: str, lr: str, seed: int) -> Job:
    """The arm's run."""
    settings = (*ARMS[arm], f"optimizer.lr={lr}")
    return Job(regime=regime, settings=tuple(sorted(settings)), seed=seed)


def sweep(regime: str) -> list[Job]:
    """The runs that choose a regime's learning rate."""
    return [job(regime, TUNED, lr, seed) for seed in TUNING_SEEDS[regime] for lr in LEARNING_RATES]


def sweep_areas(regime: str, store: Store) -> dict[str, list[float]]:
    """Learning rate -> the area of each of its runs; of those that are there."""
    areas: dict[str, list[float]] = {lr: [] for lr in LEARNING_RATES}
    for lr in LEARNING_RATES:
        for seed in TUNING_SEEDS[regime]:
            if record := store.get(job(regime, TUNED, lr, seed)):
                areas[lr].append(token_area(record, REGIMES[regime].budget))
    return areas


def best_lr(regime: str, store: Store) -> str | None:
    """That of the largest mean area; None while a run of the sweep is missing."""
    areas = sweep_areas(regime, store)
    if any(len(values) < len(TUNING_SEEDS[regime]) for values in areas.values()):
        return None
    return max(LEARNING_RATES, key=lambda lr: fmean(areas[lr]))


def stages(
    store: Store, *, only: Sequence[str], regimes: Sequence[str], seeds: range
) -> Iterator[list[Job]]:
    """Jobs that are not done yet; each list is asked for when the one before it is done."""
    for stage in STAGES:
        chosen = [regime for regime in stage.regimes if regime in regimes]
        if stage.study not in only or not chosen:
            continue
        yield missing([each for regime in chosen for each in sweep(regime)], store)
        yield missing(reported(replace(stage, regimes=chosen), seeds, store), store)


def reported(stage: Stage, seeds: range, store: Store) -> list[Job]:
    """Of the stage's seeds those in `seeds`; of regimes whose learning rate is known."""
    tuning = {seed for regime in stage.regimes for seed in TUNING_SEEDS[regime]}
    assert not tuning & set(seeds), "seeds that chose a learning rate are not reported"
    study = STUDIES[stage.study]
    rates = {regime: study.lr or best_lr(regime, store) for regime in stage.regimes}
    return [
        job(regime, arm, lr, seed)
        for seed in seeds
        if seed < stage.num_seeds
        for regime, lr in rates.items()
        if lr is not None
        for arm in study.arms[: stage.num_arms]
    ]


def missing(jobs: Sequence[Job], store: Store) -> list[Job]:
    """In the same order, each once."""
    return [each for each in dict.fromkeys(jobs) if store.get(each) is None]

"""Which runs, in which order?   stages of the table -> jobs, each once

A stage's jobs are known when the learning rates of its regimes are: sweeps come before it. Within a
stage all arms of a seed come before the next seed, so that a stop leaves whole pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    for study, among, num_arms in STAGES:
        chosen = [regime for regime in among if regime in regimes]
        if study not in only or not chosen:
            continue
        yield missing([each for regime in chosen for each in sweep(regime)], store)
        yield missing(reported(study, chosen, num_arms, seeds, store), store)


def reported(
    study: str, regimes: Sequence[str], num_arms: int, seeds: range, store: Store
) -> list[Job]:
    """Of the study's seeds those in `seeds`."""
    tuning = {seed for regime in regimes for seed in TUNING_SEEDS[regime]}
    assert not tuning & set(seeds), "seeds that chose a learning rate are not reported"
    each = STUDIES[study]
    found: list[Job] = []
    for seed in seeds:
        for regime in regimes:
            lr = best_lr(regime, store)
            if lr is not None and seed < each.num_seeds[regime]:
                found += [job(regime, arm, lr, seed) for arm in each.arms[:num_arms]]
    return found


def missing(jobs: Sequence[Job], store: Store) -> list[Job]:
    """In the same order, each once."""
    return [each for each in dict.fromkeys(jobs) if store.get(each) is None]

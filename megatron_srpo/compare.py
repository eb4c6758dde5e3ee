"""Is one policy better than another?   two evaluations, problem by problem -> differences

A paired bootstrap over problems (Efron & Tibshirani 1993, chapter 13; Koehn 2004): both policies
answered the same problems, so only their differences are drawn again. What other seeds of
generation would give is in it as far as problems were answered several times.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from megatron_srpo.config_file import load_config
from megatron_srpo.data import read_rows
from megatron_srpo.evaluate import CONFIG, RESPONSES
from megatron_srpo.held_out import rewards_of
from megatron_srpo.types import InputError, Score

NUM_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A problem, and what one policy made of it."""

    digest: str
    """Of question and right answer."""
    shares: dict[str, float]
    """Kind of response, greedy or sampled -> share of right ones."""


Problems = dict[tuple[str, str], Answered]
"""By set and id."""


def compare(first: Path, second: Path) -> pd.DataFrame:
    """Folders of `megatron-srpo eval --out`. Index: set, kind (greedy, sampled). Columns:
    `num_problems` that both have, `left_out`, those that only one has, `first` and `second`, the
    shares of right responses, `difference` (second - first) and its 95 % interval, `low`, `high`.

    Raises `InputError` if there is nothing to compare, or if problems of one name or the rewards of
    a set differ.
    """
    _check_rewards(first, second)
    one, other = _problems(first), _problems(second)
    rows = []
    for name, kind in dict.fromkeys((key[0], kind) for key in one for kind in one[key].shares):
        mine, theirs = (_of(problems, name, kind) for problems in (one, other))
        shared = [key for key in mine if key in theirs]
        for key in shared:
            if one[key].digest != other[key].digest:
                raise InputError(
                    f"problem {key[1]!r} of set {name} is not the same in {first} and in {second}"
                )
        if shared:
            pairs = np.array([(mine[key], theirs[key]) for key in shared])
            num_left_out = len(mine.keys() ^ theirs.keys())
            rows.append({"set": name, "kind": kind, **_row(pairs, num_left_out)})
    if not rows:
        raise InputError(f"{first} and {second} have no problem in common")
    return pd.DataFrame(rows).set_index(["set", "kind"])


def _check_rewards(first: Path, second: Path) -> None:
    one, other = (load_config(folder / CONFIG) for folder in (first, second))
    for name in one.eval.sets.keys() & other.eval.sets.keys():
        rewards = [rewards_of(cfg.eval.sets[name], cfg)[0] for cfg in (one, other)]
        if rewards[0] != rewards[1]:
            raise InputError(
                f"set {name} was judged by {rewards[0]} in {first}, by {rewards[1]} in {second}"
            )


def _of(problems: Problems, name: str, kind: str) -> dict[tuple[str, str], float]:
    """Shares of right responses of one set and kind."""
    return {
        key: each.shares[kind]
        for key, each in problems.items()
        if key[0] == name and kind in each.shares
    }


def _problems(folder: Path) -> Problems:
    """Responses whose reward failed have no verdict and count nowhere. Seeds weigh alike."""
    verdicts: dict[tuple[str, str], dict[int | None, list[bool]]] = {}
    digests: dict[tuple[str, str], str] = {}
    path = folder / RESPONSES
    for number, row in enumerate(read_rows(path, ("set", "prompt_id", "problem")), start=1):
        try:
            key, score = (row["set"], row["prompt_id"]), Score(**row["score"])
            digests[key] = row["problem"]
            of_problem = verdicts.setdefault(key, defaultdict(list))
            if score.failure is None:
                of_problem[row["seed"]].append(score.correct is True)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: row {number} is no response of an evaluation") from error
    return {
        key: Answered(digest=digests[key], shares=_shares(of_problem))
        for key, of_problem in verdicts.items()
    }


def _shares(verdicts: dict[int | None, list[bool]]) -> dict[str, float]:
    sampled = [np.mean(each) for seed, each in verdicts.items() if seed is not None]
    shares = {"greedy": float(np.mean(verdicts[None]))} if None in verdicts else {}
    return shares | ({"sampled": float(np.mean(sampled))} if sampled else {})


def _row(pairs: np.ndarray, num_left_out: int) -> dict[str, float]:
    """`pairs` [problems, 2]"""
    differences = pairs[:, 1] - pairs[:, 0]
    low = high = float("nan")
    if len(differences) > 1:
        found = bootstrap(
            (differences,),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        low, high = found.confidence_interval
    return {
        "num_problems": len(pairs),
        "left_out": num_left_out,
        "first": float(pairs[:, 0].mean()),
        "second": float(pairs[:, 1].mean()),
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
    }

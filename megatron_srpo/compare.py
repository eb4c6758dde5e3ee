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

from megatron_srpo.data import read_rows
from megatron_srpo.evaluate import RESPONSES
from megatron_srpo.types import InputError

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
    `num_problems` that both have, `first` and `second`, the shares of right responses,
    `difference` (second - first) and its 95 % interval, `low` and `high`.

    Raises `InputError` if there is nothing to compare, or problems of one name differ.
    """
    one, other = _problems(first), _problems(second)
    shared = [key for key in one if key in other]
    for name, id in shared:
        if one[name, id].digest != other[name, id].digest:
            raise InputError(
                f"problem {id!r} of set {name} is not the same in {first} and in {second}"
            )
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for key in shared:
        for kind, share in one[key].shares.items():
            if kind in other[key].shares:
                pairs[key[0], kind].append((share, other[key].shares[kind]))
    if not pairs:
        raise InputError(f"{first} and {second} have no problem in common")
    rows = [
        {"set": name, "kind": kind, **_row(np.array(each))} for (name, kind), each in pairs.items()
    ]
    return pd.DataFrame(rows).set_index(["set", "kind"])


def _problems(folder: Path) -> Problems:
    """Responses whose reward failed have no verdict and count nowhere."""
    verdicts: dict[tuple[str, str], dict[str, list[bool]]] = {}
    digests: dict[tuple[str, str], str] = {}
    path = folder / RESPONSES
    for number, row in enumerate(read_rows(path, ("set", "prompt_id", "problem")), start=1):
        try:
            key = (row["set"], row["prompt_id"])
            digests[key] = row["problem"]
            kind = "greedy" if row["seed"] is None else "sampled"
            of_problem = verdicts.setdefault(key, defaultdict(list))
            if row["score"]["failure"] is None:
                of_problem[kind].append(row["score"]["correct"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: row {number} is no response of an evaluation") from error
    return {
        key: Answered(
            digest=digests[key],
            shares={kind: float(np.mean(each)) for kind, each in of_problem.items()},
        )
        for key, of_problem in verdicts.items()
    }


def _row(pairs: np.ndarray) -> dict[str, float]:
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
        "first": float(pairs[:, 0].mean()),
        "second": float(pairs[:, 1].mean()),
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
    }

"""The study of bounds must be able to say no."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tools import theory


def test_bounds_that_hold_are_told_from_those_that_do_not():
    rows = theory.bounds(np.random.default_rng(0), replace(theory.QUICK, problems=30))
    broken = {row["bound"] for row in rows if row["violated"]}
    assert broken == {
        "wrong on purpose, CPI-RR, random MDPs: a G",
        "wrong on purpose, CPI-CARO, random MDPs: a G",
        "wrong on purpose, CPI-RR, traps: a G",
        "wrong on purpose, CPI-RR, traps: step tripled",
    }

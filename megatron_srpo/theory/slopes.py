"""Which power of x is y?   points -> exponent and its interval"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from megatron_srpo.theory.mdp import Reals


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def log_log_slope(x_CP: Reals, y_CP: Reals) -> Slope:
    """Exponent k of y = c x^k, common to C curves of P points, with a constant c for each.

    Least squares on logs that are centred curve by curve; each of them costs a degree of freedom.
    The interval is what scatter about one straight line says: not what bends for all curves alike.
    """
    log_x, log_y = (np.log(z) - np.log(z).mean(1, keepdims=True) for z in (x_CP, y_CP))
    squares = (log_x**2).sum()
    slope = float((log_x * log_y).sum() / squares)
    freedom = x_CP.size - len(x_CP) - 1
    variance = ((log_y - slope * log_x) ** 2).sum() / freedom / squares
    half = float(t.ppf(0.975, freedom) * np.sqrt(variance))
    return Slope(value=slope, low=slope - half, high=slope + half)

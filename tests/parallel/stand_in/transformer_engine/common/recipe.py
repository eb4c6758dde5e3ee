"""Recipes: what they are told, and nothing done with it."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    def __init__(self, **told: Any) -> None:
        self.told = told


class DelayedScaling(Recipe): ...


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class MXFP8BlockScaling(Recipe): ...


class NVFP4BlockScaling(Recipe): ...

"""Which recipe is in force, and which weights are made in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FP8GlobalStateManager:
    recipe: Any = None
    makes_weights = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    FP8GlobalStateManager.makes_weights = enabled
    try:
        yield
    finally:
        FP8GlobalStateManager.makes_weights = False

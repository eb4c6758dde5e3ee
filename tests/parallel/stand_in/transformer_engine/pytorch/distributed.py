"""What Megatron subclasses and calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint


class CudaRNGStatesTracker:
    def reset(self) -> None: ...


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    return torch_checkpoint(function, *args, use_reentrant=True, **kwargs)


@contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False

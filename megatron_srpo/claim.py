"""May this run work in its folder?   the first rank asks, every rank hears the answer"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import InputError


@contextlib.contextmanager
def claimed(
    folder: RunFolder,
    begin: Callable[[], None],
    *,
    rank: int,
    gather: Callable[[Any], list[Any]],
) -> Iterator[None]:
    """Collective: the first rank is alone at work in the folder until this is left, and has done
    `begin` there before any other rank goes on.

    `gather`: every rank's value, on every rank (`Mesh.gather`). Raises `InputError` on all ranks if
    another process is at work there, `begin` raises one, or the folder cannot be written to.
    """
    with contextlib.ExitStack() as held:
        problem: str | None = None
        if rank == 0:
            try:
                held.enter_context(folder.at_work())
                begin()
            except InputError as error:
                problem = str(error)
            except OSError as error:
                problem = f"run_dir={folder.root}: {error}"
        problem = gather(problem)[0]
        if problem is not None:
            raise InputError(problem)
        yield

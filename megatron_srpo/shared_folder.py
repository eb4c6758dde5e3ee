"""Do all nodes see the run's folder?   one rank leaves a token, every rank looks for it

A run whose nodes write into folders of their own, all of one name, looks well until it is resumed.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from megatron_srpo.run_folder import PREFLIGHT

SEEN_S = 10.0
"""So long a network file system may take to show what another node has written."""
LOOK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A file in the nearest folder above the run's (or the run's own) that exists."""

    up: int
    """So many steps above the run's folder."""
    name: str
    content: str
    problem: str | None = None
    """Why there is none."""


@contextlib.contextmanager
def token_for(run_dir: Path) -> Generator[Token]:
    """As long as the context lasts; nothing else is made or changed there."""
    folder = Path(os.path.abspath(run_dir))
    up = next(up for up, above in enumerate([folder, *folder.parents]) if above.is_dir())
    above = [folder, *folder.parents][up]
    content = uuid.uuid4().hex
    token = Token(up=up, name=f"{PREFLIGHT}{content}", content=content)
    file = above / token.name
    try:
        file.write_text(content)
    except OSError as error:
        yield Token(up=up, name="", content="", problem=f"{above}: {error.strerror}")
        return
    try:
        yield token
    finally:
        file.unlink(missing_ok=True)


def problem_with(run_dir: Path, token: Token) -> str | None:
    """Why this node is not fit to write there: the token is not what it should be, or no file can
    be made and removed beside it. None: it is fit."""
    if token.problem is not None:
        return f"run_dir={run_dir} cannot be written to ({token.problem})"
    folder = Path(os.path.abspath(run_dir))
    above = [folder, *folder.parents][token.up]
    file = above / token.name
    deadline = time.monotonic() + SEEN_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    try:
        if file.read_text() != token.content:
            return f"run_dir={run_dir} does not hold what the first rank has written there"
        own = above / f"{PREFLIGHT}{uuid.uuid4().hex}"
        own.touch(exist_ok=False)
        own.unlink()
    except FileNotFoundError:
        return f"run_dir={run_dir} is not in a folder that all nodes share ({above})"
    except OSError as error:
        return f"run_dir={run_dir} cannot be written to ({above}: {error.strerror})"
    return None

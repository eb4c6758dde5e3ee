"""Which piece of a text is a token?   token ids -> texts, by the run's tokenizer

Read by `tokenizers` alone: a report is made without torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from megatron_srpo.report.record import RunRecord
from megatron_srpo.types import Tokens

Pieces = Callable[[Tokens], list[str]]
"""As `HFTokenizer.pieces`; joined, the response's text."""


def find_pieces(run: RunRecord) -> tuple[Pieces | None, str | None]:
    """Of the trained policy, a checkpoint or the first policy, whichever is still there; or none,
    and why."""
    folders = [run.folder.hf, *sorted(run.folder.checkpoints.glob("*/hf"), reverse=True)]
    if run.cfg is not None:
        folders.append(run.cfg.model)
    for folder in folders:
        if _is_readable(folder / "tokenizer.json"):
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return partial(_pieces, tokenizer), None
    tried = ", ".join(map(str, folders))
    return None, f"tokenizer.json: not in {tried}; thoughts are not divided into tokens"


def _is_readable(path: Path) -> bool:
    try:
        return "model" in json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False


def _pieces(tokenizer: Tokenizer, token_ids: Tokens) -> list[str]:
    stream = DecodeStream(skip_special_tokens=True)
    return [stream.step(tokenizer, int(token)) or "" for token in token_ids]

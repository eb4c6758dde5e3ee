"""Which problems come next?   JSONL or parquet -> shuffled, sharded, resumable prompts

Each epoch is a permutation drawn from (seed, epoch) alone, so the position is the whole state.
Columns: `prompt` (text, or chat messages), `answer`, optional `id` and `solution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from megatron_srpo.protocols import Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import InputError, Prompt, Sample, Tokens

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_rows(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a file. `InputError` names the first row that lacks a required column."""
    if not path.is_file():
        raise InputError(f"{path}: no such data file")
    if path.suffix not in LOADERS:
        raise InputError(f"{path}: must end in one of {', '.join(LOADERS)}")
    if not path.stat().st_size:
        raise InputError(f"{path}: holds no rows")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{path}: not readable as {LOADERS[path.suffix]} ({cause})") from error
    if not len(rows):
        raise InputError(f"{path}: holds no rows")
    listed = [dict(row) for row in rows]
    for number, row in enumerate(listed, start=1):
        for column in required:
            if row.get(column) in (None, ""):
                raise InputError(f"{path}: row {number} has no {column!r}")
    return listed


def read_prompts(
    path: Path, tokenizer: Tokenizer, *, max_prompt_tokens: int, long_prompts: str
) -> tuple[list[Prompt], list[str]]:
    """(prompts, ids of those dropped because they are longer than `max_prompt_tokens`)."""
    prompts: dict[str, Prompt] = {}
    dropped: list[str] = []
    for number, row in enumerate(read_rows(path, ("prompt", "answer")), start=1):
        id = str(row["id"]) if row.get("id") is not None else f"row{number}"
        if id in prompts or id in dropped:
            raise InputError(f"{path}: row {number} has the id {id!r} of an earlier row")
        text, token_ids = _encode(row["prompt"], tokenizer)
        if len(token_ids) > max_prompt_tokens:
            if long_prompts == "error":
                raise InputError(
                    f"{path}: prompt {id!r} has {len(token_ids)} tokens, data.max_prompt_tokens "
                    f"is {max_prompt_tokens} (data.long_prompts=drop leaves such prompts out)"
                )
            dropped.append(id)
            continue
        prompts[id] = Prompt(
            id=id,
            text=text,
            token_ids=token_ids,
            answer=str(row["answer"]),
            solution=tuple(row.get("solution") or ()),
        )
    if not prompts:
        raise InputError(f"{path}: every prompt is longer than {max_prompt_tokens} tokens")
    return list(prompts.values()), dropped


def _encode(prompt: str | list[dict[str, str]], tokenizer: Tokenizer) -> tuple[str, Tokens]:
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    return "\n\n".join(m["content"] for m in prompt), tokenizer.encode_chat(prompt)


def read_demonstrations(path: Path, tokenizer: Tokenizer) -> list[tuple[Tokens, Tokens]]:
    """(prompt, response) tokens; each response ends with end-of-sequence."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return [
        (
            _encode(row["prompt"], tokenizer)[1],
            np.concatenate([tokenizer.encode(row["response"]), eos]),
        )
        for row in read_rows(path, ("prompt", "response"))
    ]


def demonstration_sample(
    id: str, prompt: Tokens, response: Tokens, *, weight: float, count: float
) -> Sample:
    """Cross entropy as a sample: advantage 1 on every response token, their mean times `weight`."""
    num_prompt, num_response = len(prompt), len(response)
    loss_weight = np.zeros(num_prompt + num_response, dtype=np.float32)
    loss_weight[num_prompt:] = weight / num_response
    return Sample(
        id=id,
        token_ids=np.concatenate([prompt, response]),
        loss_weight=loss_weight,
        advantage=np.ones_like(loss_weight),
        logprob=np.full_like(loss_weight, np.nan),
        count=count,
    )


class EpochOrder:
    """Positions 0, 1, 2, ... -> indices below `size`, each epoch a new permutation."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._size)
        if self._cached[0] != epoch:
            generator = np.random.Generator(np.random.Philox(counter_seed(self._seed, epoch)))
            self._cached = (epoch, generator.permutation(self._size))
        return int(self._cached[1][offset])


class PromptSet:
    """Implements `protocols.PromptSource` for one replica: its share of each step's prompts."""

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, replica: int, num_replicas: int
    ) -> None:
        self._prompts = prompts
        self._order = EpochOrder(len(prompts), seed)
        self._replica, self._num_replicas = replica, num_replicas
        self._position = 0

    def next(self, num_prompts: int) -> list[Prompt]:
        """This replica's consecutive share of the next `num_prompts` of all replicas.

        A step holds no prompt twice: an epoch's last prompts, too few for a step, are left out.
        """
        left = -self._position % len(self._prompts) or len(self._prompts)
        if left < num_prompts:
            self._position += left
        share = num_prompts // self._num_replicas
        first = self._position + self._replica * share
        self._position += num_prompts
        return [self._prompts[self._order[first + i]] for i in range(share)]

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]

"""Which problems come next?   JSONL or parquet -> shuffled, sharded, resumable prompts

Each epoch is a permutation drawn from (seed, epoch) alone, so the position is the whole state.
Columns: `prompt` (text, or chat messages), `answer`, optional `id` and `solution`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from megatron_srpo.config import Config
from megatron_srpo.protocols import Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import InputError, Prompt, Sample, Tokens


def read_rows(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a file. `InputError` names the first row that lacks a required column."""
    if not path.is_file():
        raise InputError(f"{path}: no such data file")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"{path}: must end in one of {', '.join(readers)}")
    rows = readers[path.suffix](path)
    if not rows:
        raise InputError(f"{path}: holds no rows")
    for number, row in enumerate(rows, start=1):
        for column in required:
            if row.get(column) in (None, ""):
                raise InputError(f"{path}: row {number} has no {column!r}")
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    # Not through `datasets`: its JSON reader turns a column of dates into timestamps.
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_text("utf-8").split("\n"):
            if line.strip():
                rows.append(dict(json.loads(line)))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: row {len(rows) + 1} is not readable ({error})") from error
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{path}: not readable as parquet ({cause})") from error
    return [dict(row) for row in table]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a question is put to the policy. The default: as it stands."""

    template: str = "{prompt}"
    chat: bool = False
    answer_format: str = ""
    delimiter: str = ""

    @classmethod
    def of(cls, cfg: Config, *, answer_format: str | None = None) -> PromptFormat:
        """That of the run's prompts, but for an answer format of its own."""
        return cls(
            template=cfg.data.template,
            chat=cfg.data.chat,
            answer_format=cfg.data.answer_format if answer_format is None else answer_format,
            delimiter=cfg.thoughts.delimiter,
        )

    def encode(self, question: str, tokenizer: Tokenizer) -> Tokens:
        """Raises `InputError` where a chat template is wanted and the tokenizer has none."""
        text = self.template.format(
            prompt=question, answer_format=self.answer_format, delimiter=self.delimiter
        )
        if self.chat:
            return tokenizer.encode_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text)


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    *,
    format: PromptFormat = PromptFormat(),
    max_prompt_tokens: int,
    long_prompts: str,
) -> tuple[list[Prompt], list[str]]:
    """(prompts, ids of those dropped because they are longer than `max_prompt_tokens`)."""
    prompts: dict[str, Prompt] = {}
    dropped: list[str] = []
    for number, row in enumerate(read_rows(path, ("prompt", "answer")), start=1):
        where = f"{path}: row {number}"
        id = str(row["id"]) if row.get("id") is not None else f"row{number}"
        if id in prompts or id in dropped:
            raise InputError(f"{where} has the id {id!r} of an earlier row")
        text, token_ids = _encode(row["prompt"], tokenizer, where, format)
        if len(token_ids) > max_prompt_tokens:
            if long_prompts == "error":
                raise InputError(
                    f"{path}: prompt {id!r} has {len(token_ids)} tokens, data.max_prompt_tokens "
                    f"is {max_prompt_tokens} (data.long_prompts=drop leaves such prompts out)"
                )
            dropped.append(id)
            continue
        answer = row["answer"]
        is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
        if not isinstance(answer, str) and not (is_number and isfinite(answer)):
            raise InputError(f"{where}: answer must be a text or a number")
        prompts[id] = Prompt(
            id=id,
            text=text,
            token_ids=token_ids,
            answer=str(answer),
            solution=_solution(row.get("solution"), where),
        )
    if not prompts:
        raise InputError(f"{path}: every prompt is longer than {max_prompt_tokens} tokens")
    return list(prompts.values()), dropped


def _solution(given: Any, where: str) -> tuple[str, ...]:
    thoughts = given if given is not None else []
    if not isinstance(thoughts, list) or not all(isinstance(text, str) for text in thoughts):
        raise InputError(f"{where}: solution must be a list of texts, one a thought")
    return tuple(thoughts)


def _encode(
    prompt: Any, tokenizer: Tokenizer, where: str, format: PromptFormat = PromptFormat()
) -> tuple[str, Tokens]:
    """(the question without any template, tokens)"""
    is_chat = isinstance(prompt, list)
    if not isinstance(prompt, str) and not (is_chat and all(map(_is_message, prompt))):
        raise InputError(f"{where}: prompt must be a text or chat messages (role, content)")
    if is_chat and format.template != PromptFormat().template:
        raise InputError(f"{where}: chat messages have no place in a data.template")
    try:
        if not is_chat:
            return prompt, format.encode(prompt, tokenizer)
        token_ids = tokenizer.encode_chat(prompt)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return "\n\n".join(message["content"] for message in prompt), token_ids


def _is_message(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("content"), str)


def read_demonstrations(path: Path, tokenizer: Tokenizer) -> list[tuple[Tokens, Tokens]]:
    """(prompt, response) tokens; each response ends with end-of-sequence."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    demonstrations: list[tuple[Tokens, Tokens]] = []
    for number, row in enumerate(read_rows(path, ("prompt", "response")), start=1):
        where = f"{path}: row {number}"
        if not isinstance(row["response"], str):
            raise InputError(f"{where}: response must be a text")
        _, prompt = _encode(row["prompt"], tokenizer, where)
        demonstrations.append((prompt, np.concatenate([tokenizer.encode(row["response"]), eos])))
    return demonstrations


def demonstration_sample(
    id: str, prompt: Tokens, response: Tokens, *, weight: float, count: float, turn: int = 0
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
        turn=turn,
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

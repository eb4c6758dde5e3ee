"""Text to tokens and back, by the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from megatron_srpo.hf_folder import read_config
from megatron_srpo.types import InputError, Tokens


class HFTokenizer:
    """Implements `protocols.Tokenizer`; `pieces` is the fast tokenizer's streaming decoder."""

    def __init__(self, folder: Path) -> None:
        """Raises `InputError` if the folder has no tokenizer, or one that is not the model's."""
        model = read_config(folder)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: no tokenizer (it has no tokenizer.json)")
        # tokenizer.json as it stands: AutoTokenizer picks a class by the model's type, and that
        # class may put its own pre-tokenizer and tokens in the file's place.
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: no readable tokenizer ({_one_line(error)})") from error
        largest = max(self._tokenizer.get_vocab().values())
        if largest >= model["vocab_size"]:
            raise InputError(
                f"{folder}: the tokenizer does not belong to the model: it has token {largest}, "
                f"the model's vocabulary ends at {model['vocab_size'] - 1}"
            )
        eos = self._tokenizer.eos_token_id
        stops = model.get("eos_token_id")
        if eos is None:
            raise InputError(f"{folder}: the tokenizer names no end-of-sequence token")
        if stops is not None and eos not in (stops if isinstance(stops, list) else [stops]):
            raise InputError(
                f"{folder}: the tokenizer does not belong to the model: its end-of-sequence token "
                f"is {eos}, the model's is {stops}"
            )
        self.eos_token_id: int = eos

    def encode(self, text: str) -> Tokens:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> Tokens:
        """Raises `InputError` if the tokenizer has no chat template."""
        if self._tokenizer.chat_template is None:
            raise InputError("chat messages were given, but the tokenizer has no chat template")
        text = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return self.encode(str(text))

    def shown(self, token_ids: Tokens) -> str:
        """All of it, special tokens too."""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))

    def pieces(self, token_ids: Tokens) -> list[str]:
        stream = DecodeStream(skip_special_tokens=True)
        backend = self._tokenizer.backend_tokenizer
        return [stream.step(backend, int(token)) or "" for token in token_ids]


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

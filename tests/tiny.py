"""Tiny policies in Hugging Face format, with weights large enough that mistakes show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_srpo.types import Sample, Tokens

CHARACTERS = "_$0123456789+-*?\n"
VOCAB_SIZE = 32


def write_policy(folder: Path, *, seed: int, tied: bool = True) -> Path:
    """A two-layer Qwen2 whose every parameter, biases and norms included, is random."""
    characters = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[], unk_token="_")
    )
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="$", pad_token="_", unk_token="_"
    ).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + ("norm" in name))
    model.save_pretrained(folder)
    return folder


def random_samples(num: int, *, seed: int) -> list[Sample]:
    """Sequences of unequal length whose first tokens, prompt and copied prefix, are not trained."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for index in range(num):
        length, fixed = int(rng.integers(12, 60)), int(rng.integers(2, 11))
        weight = np.zeros(length, dtype=np.float32)
        weight[fixed:] = 1.0 / (length - fixed)
        samples.append(
            Sample(
                id=f"sample{index}",
                token_ids=rng.integers(2, VOCAB_SIZE, length).astype(np.int32),
                loss_weight=weight,
                advantage=np.full(length, rng.normal(), dtype=np.float32),
                logprob=-rng.random(length).astype(np.float32),
                count=1.0,
            )
        )
    return samples


def reference_logprobs(folder: Path, tokens: Tokens, *, temperature: float = 1.0) -> torch.Tensor:
    """[T - 1] in float64, by transformers: of every token after the first."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return logprobs_of(model, tokens, temperature=temperature)


def logprobs_of(
    model: torch.nn.Module, tokens: Tokens, *, temperature: float = 1.0
) -> torch.Tensor:
    """[T - 1], differentiable."""
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids[None]).logits[0] / temperature
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]

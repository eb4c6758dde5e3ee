"""Tiny policies in Hugging Face format, with weights large enough that mistakes show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_srpo.hf_folder import read_config
from megatron_srpo.types import Sample, Tokens

CHARACTERS = "_$0123456789+-*?\n"
VOCAB_SIZE = 37
"""Odd: no tensor parallel size divides it."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 16.0}
NARROW = {"hidden_size": 96, "head_dim": 32}
"""The heads together are wider than what they attend to."""
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": NARROW,
    "llama": NARROW
    | {
        "rope_parameters": ROPE
        | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "qwen3_moe": NARROW
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmo2": {},
    "olmo3": {
        "sliding_window": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": ROPE | {"rope_type": "yarn"},
        },
    },
}
"""What is special about each; sequences in tests are longer than window and original length."""


def write_policy(
    folder: Path,
    *,
    seed: int,
    family: str = "qwen2",
    tied: bool = True,
    num_layers: int = 2,
    **changed: Any,
) -> Path:
    """A model whose every parameter, biases and norms included, is random; with a tokenizer."""
    characters = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[], unk_token="_")
    )
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="$", pad_token="_", unk_token="_"
    ).save_pretrained(folder)
    shape = SHAPE | FAMILIES[family] | {"num_hidden_layers": num_layers} | changed
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **shape, tie_word_embeddings=tied)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + ("norm" in name))
    model.save_pretrained(folder)
    return folder


def transformers_model(folder: Path) -> torch.nn.Module:
    """In float64: what is right."""
    # Its default for experts is a kernel that has no float64.
    eager = (
        {"experts_implementation": "eager"} if "moe" in read_config(folder)["model_type"] else {}
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)


def by_stored_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names that a folder has: transformers keeps a layer's experts in two tensors."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        experts, is_of_experts, part = name.partition(".experts.")
        for index, one in enumerate(tensor if is_of_experts else []):
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
            for projection, half in zip(names, one.chunk(len(names)), strict=True):
                stored[f"{experts}.experts.{index}.{projection}.weight"] = half
        if not is_of_experts:
            stored[name] = tensor
    return stored


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
    return logprobs_of(transformers_model(folder), tokens, temperature=temperature)


def logprobs_of(
    model: torch.nn.Module, tokens: Tokens, *, temperature: float = 1.0
) -> torch.Tensor:
    """[T - 1], differentiable."""
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids[None]).logits[0] / temperature
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]

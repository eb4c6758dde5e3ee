"""What are the kernels checked and timed on?   sizes, tensors, and float64"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_srpo.loss import TokenTensors

VOCAB, HIDDEN = 152_064, 5120
TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    num_rows: int
    vocab: int
    hidden: int

    def __str__(self) -> str:
        return f"N{self.num_rows} V{self.vocab} H{self.hidden}"


SIZES = tuple(
    Size(num_rows=rows, vocab=vocab, hidden=HIDDEN)
    for vocab in (VOCAB // 8, VOCAB)
    for rows in (2048, 8192, 16_384)
)
SMOKE = (Size(num_rows=12, vocab=96, hidden=16),)


def sizes_for(device: torch.device) -> tuple[Size, ...]:
    """A CPU only shows that the checker works."""
    return SIZES if device.type == "cuda" else SMOKE


def generator_for(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(*shape: int, device: torch.device, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    """Random: GPUs multiply zeros faster."""
    drawn = torch.empty(*shape, device=device, dtype=dtype)
    return drawn.normal_(std=std, generator=generator_for(device, sum(shape)))


def head(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight (bfloat16, with gradients), targets; logits of a few units."""
    hidden = normal(size.num_rows, size.hidden, device=device, dtype=torch.bfloat16)
    std = 3.0 / size.hidden**0.5
    weight = normal(size.vocab, size.hidden, device=device, dtype=torch.bfloat16, std=std)
    return hidden.requires_grad_(), weight.requires_grad_(), targets(size, device)


def targets(size: Size, device: torch.device) -> Tensor:
    shape = (size.num_rows,)
    return torch.randint(size.vocab, shape, device=device, generator=generator_for(device))


def tokens(num_rows: int, device: torch.device, *, share: float = 1.0) -> TokenTensors:
    """Two responses; only the first `share` of the rows is trained."""

    def row() -> Tensor:
        return normal(num_rows, device=device, dtype=torch.float32)

    place = torch.arange(num_rows, device=device)
    return TokenTensors(
        loss_weight_T=(place < share * num_rows).float(),
        advantage_T=row(),
        rollout_T=row() * 0.1 - 8,
        old_T=row() * 0.1 - 8.05,
        reference_T=None,
        cu_seqlens=torch.tensor([0, num_rows // 2, num_rows], device=device, dtype=torch.int32),
    )


def in_float64(tokens: TokenTensors) -> TokenTensors:
    """The same numbers."""
    return replace(
        tokens,
        loss_weight_T=tokens.loss_weight_T.double(),
        advantage_T=tokens.advantage_T.double(),
        rollout_T=tokens.rollout_T.double(),
        old_T=None if tokens.old_T is None else tokens.old_T.double(),
        reference_T=None if tokens.reference_T is None else tokens.reference_T.double(),
    )


def exact(logits: Tensor, target_ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in float64; differentiable."""
    logp = (logits.double() / temperature.double()[:, None]).log_softmax(-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, target_ids[:, None])[:, 0], entropy

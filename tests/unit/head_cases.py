"""Hidden states, heads and targets, and what is right of them: float64, written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Case = tuple[Tensor, Tensor, Tensor, Tensor]
"""hidden [N, H], weight [V, H], targets [N], temperature [N]"""


def drawn(
    num_rows: int, vocab: int, hidden: int = 5, *, dtype: torch.dtype = torch.float64
) -> Case:
    random = torch.Generator().manual_seed(num_rows * 1000 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocab, (num_rows,), generator=random)
    temperature = 0.5 + torch.rand(num_rows, generator=random, dtype=torch.float64)
    return normal(num_rows, hidden), normal(vocab, hidden), targets, temperature


def written_out(case: Case) -> tuple[Tensor, Tensor]:
    hidden, weight, targets, temperature = case
    z = hidden.double() @ weight.double().T / temperature[:, None].double()
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def assert_same(found: Any, right: Any, *, atol: float = 1e-12) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-12, atol=atol)

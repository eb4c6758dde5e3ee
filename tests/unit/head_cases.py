"""Hidden states, heads and targets, and what is right of them: float64, written out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
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


Chosen = tuple[Tensor, Tensor, Tensor, Tensor]
"""logits [T, V], rows [N], targets [N], temperature [N]"""


def chosen_rows(num_rows: int, num_chosen: int, vocab: int) -> Chosen:
    """Any rows, some of them more than once."""
    logits, _, _, _ = drawn(num_rows, 1, vocab)
    _, _, targets, temperature = drawn(num_chosen, vocab, 1)
    random = torch.Generator().manual_seed(num_rows)
    return logits, torch.randint(0, num_rows, (num_chosen,), generator=random), targets, temperature


def written_out(case: Case) -> tuple[Tensor, Tensor]:
    hidden, weight, targets, temperature = case
    logits = hidden.double() @ weight.double().T
    return of_chosen(logits, torch.arange(len(hidden)), targets, temperature)


def of_chosen(
    logits: Tensor, rows: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    z = logits.double()[rows] / temperature[:, None].double()
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def assert_same(found: Any, right: Any, *, atol: float = 1e-12) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-12, atol=atol)


def gradients(found: tuple[Tensor, Tensor], to: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every row counts otherwise."""
    logprob, entropy = found
    factor = torch.linspace(-1, 2, len(logprob), dtype=logprob.dtype)
    return torch.autograd.grad((logprob * factor).sum() + (entropy * factor.cos()).sum(), to)


def alive_products(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> tuple[list[weakref.ref[Tensor]], list[int]]:
    """The logits that a module makes, and how many are there whenever there is one more."""
    made: list[weakref.ref[Tensor]] = []
    numbers: list[int] = []
    product = module.product

    def counted(left: Tensor, right: Tensor) -> Tensor:
        out = product(left, right)
        made.append(weakref.ref(out))
        numbers.append(sum(one() is not None for one in made))
        return out

    monkeypatch.setattr(module, "product", counted)
    return made, numbers

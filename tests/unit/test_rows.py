"""What pieces of a row's logits say together is what the whole row says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_srpo.kernels import rows
from tests.unit.head_cases import Case, assert_same, drawn, written_out


def shard_statistics(case: Case, bounds: list[int]) -> Tensor:
    """[shards, 4, N] as ranks have them before they are merged."""
    hidden, weight, targets, temperature = case
    parts: list[Tensor] = []
    for first, end in itertools.pairwise(bounds):
        stats = rows.nothing_seen(len(targets), like=temperature)
        if end > first:
            rows.absorb(stats, hidden @ weight[first:end].T, targets - first, temperature)
        parts.append(stats)
    return torch.stack(parts)


@pytest.mark.parametrize("bounds", [[0, 17], [0, 5, 17], [0, 1, 2, 17], [0, 0, 9, 17, 17]])
def test_shards_of_any_size_merge_to_the_whole_vocabulary(bounds: list[int]):
    case = drawn(6, 17)
    logprob, entropy, softmax = rows.concluded(shard_statistics(case, bounds), case[3])
    assert_same((logprob, entropy), written_out(case))
    log_sum = ((case[0] @ case[1].T) - softmax[0][:, None]).div(case[3][:, None]).logsumexp(1)
    assert_same(softmax[1:], (log_sum, entropy))


def test_a_shard_of_nothing_but_minus_infinity_adds_nothing():
    case = drawn(3, 4)
    stats = shard_statistics(case, [0, 4])
    empty = rows.nothing_seen(3, like=stats)
    rows.absorb(empty, torch.full((3, 2), -torch.inf).double(), case[2] - 4, case[3])
    assert torch.equal(rows.merged(torch.cat([empty[None], stats]), case[3]), stats[0])


@pytest.mark.parametrize("size", [1.0, 4e4, 1e30])
def test_pieces_that_differ_by_any_size_merge_to_the_larger(size: float):
    case = drawn(6, 12)
    case[1][5:] *= size
    m, s, u, t = rows.merged(shard_statistics(case, [0, 2, 5, 9, 12]), case[3])
    found, right = ((t - m) / case[3] - s.log(), s.log() - u / s), written_out(case)
    assert all(torch.isfinite(x).all() for x in found)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("first", [0, 5, 9])
def test_gradients_of_a_piece_are_those_of_its_columns(first: int):
    hidden, weight, targets, temperature = drawn(8, 9)
    logits = (hidden @ weight.T).requires_grad_()
    m, s, u, _ = shard_statistics((hidden, weight, targets, temperature), [0, 9])[0]
    softmax = torch.stack([m, s.log(), s.log() - u / s])
    by_output = torch.stack([torch.linspace(-1, 1, 8), torch.linspace(2, 0, 8)]).double()
    logp = (logits / temperature[:, None]).log_softmax(-1)
    outputs = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    loss = sum((by * output).sum() for by, output in zip(by_output, outputs, strict=True))
    (right,) = torch.autograd.grad(loss, logits)
    own = logits.detach()[:, first:].clone()
    found = rows.gradients(own, targets - first, temperature, softmax, by_output, torch.float64)
    assert_same([found], [right[:, first:]])

"""The Triton functions in Triton's interpreter, against the ones in torch.

`test_rows_triton.py` runs this file in a process of its own: what is interpreted and what compiled
is decided where Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_srpo.kernels import rows, rows_triton

INF = torch.inf


def drawn(num_rows: int, num_columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (some of them not here), temperatures."""
    random = torch.Generator().manual_seed(num_columns)
    logits = 4 * torch.randn(num_rows, num_columns, generator=random, dtype=torch.float64)
    targets = torch.randint(-3, num_columns + 3, (num_rows,), generator=random)
    temperature = 0.5 + torch.rand(num_rows, generator=random, dtype=torch.float64)
    return logits.to(dtype), targets, temperature.to(dtype)


def both_statistics(chunks: list[Tensor], targets: Tensor, temperature: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    for functions in (rows, rows_triton):
        stats = rows.nothing_seen(len(targets), like=temperature)
        first = 0
        for chunk in chunks:
            functions.absorb(stats, chunk.clone(), targets - first, temperature)
            first += chunk.shape[1]
        found.append(stats)
    return found


def assert_close(found: Tensor, right: Tensor) -> None:
    atol = 1e-12 if right.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, right, rtol=1e-6, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [[1], [7, 30], [1024], [1500, 600], [2500]])
def test_statistics_are_those_of_torch(widths: list[int], dtype: torch.dtype):
    logits, targets, temperature = drawn(4, sum(widths), dtype)
    right, found = both_statistics(list(logits.split(widths, 1)), targets, temperature)
    assert_close(found, right)


@pytest.mark.parametrize("split", [[6], [1] * 6, [3, 3], [4, 2]])
def test_statistics_of_extreme_logits_are_those_of_torch(split: list[int]):
    logits = torch.tensor(
        [
            [-INF, -INF, -INF, 1.0, 2.0, 3.0],
            [1.0, -INF, 2.0, -INF, -INF, -INF],
            [-INF] * 6,
            [1e30, -1e30, 1e30, 0.0, 1.0, -3e38],
            [4e4, 4e4 + 1, 4e4 - 1, 4e4, 0.0, -4e4],
            [1.0, float("nan"), 2.0, 3.0, 4.0, 5.0],
        ]
    )
    targets = torch.tensor([5, 1, 0, 2, 1, 3])
    right, found = both_statistics(list(logits.split(split, 1)), targets, torch.ones(6))
    is_nan = right[1].isnan()
    assert is_nan.tolist() == [False] * 5 + [True]
    assert found[1].isnan().equal(is_nan)
    assert_close(found[:, ~is_nan], right[:, ~is_nan])


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [1, 37, 1024, 2500])
def test_gradients_are_those_of_torch(num_columns: int, out: torch.dtype):
    logits, targets, temperature = drawn(4, num_columns, torch.float32)
    logits[1, 1:] = -INF
    (_, stats), by_output = both_statistics([logits], targets, temperature), torch.randn(2, 4)
    log_sum = stats[1].log()
    softmax = torch.stack([stats[0], log_sum, log_sum - stats[2] / stats[1]])
    right, found = (
        functions.gradients(logits.clone(), targets, temperature, softmax, by_output, out)
        for functions in (rows, rows_triton)
    )
    assert found.dtype == out and torch.isfinite(found).all()
    # One unit in the last place of bfloat16, where the two round to different sides.
    rtol = 1e-5 if out == torch.float32 else 8e-3
    torch.testing.assert_close(found, right, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 300])
def test_what_parts_say_together_is_that_of_torch(
    num_rows: int, num_parts: int, dtype: torch.dtype
):
    parts: list[Tensor] = []
    logits, targets, temperature = drawn(num_rows, 7 * num_parts, dtype)
    logits[::5] *= 1e30
    logits[::7, :7] = -INF
    for part, columns in enumerate(logits.split(7, 1)):
        stats = rows.nothing_seen(num_rows, like=temperature)
        rows.absorb(stats, columns, targets - 7 * part, temperature)
        parts.append(stats)
    both = torch.stack(parts)
    right, found = (f.concluded(both, temperature) for f in (rows, rows_triton))
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, equal_nan=True)


def test_nan_of_one_part_does_not_hide_and_is_that_row_s():
    both = torch.zeros(2, 4, 3)
    both[:, 1] = 1
    both[1, :3, 1] = torch.nan
    logprob, entropy, _ = rows_triton.concluded(both, torch.ones(3))
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_no_rows_are_no_work():
    nothing = torch.zeros(1, 4, 0), torch.zeros(0)
    assert [len(x) for x in rows_triton.concluded(*nothing)] == [0, 0, 3]
    logits, targets, temperature = drawn(0, 5, torch.float32)
    stats = rows.nothing_seen(0, like=temperature)
    rows_triton.absorb(stats, logits, targets, temperature)
    nothing = rows_triton.gradients(
        logits, targets, temperature, torch.ones(3, 0), torch.ones(2, 0), torch.bfloat16
    )
    assert nothing.shape == (0, 5)

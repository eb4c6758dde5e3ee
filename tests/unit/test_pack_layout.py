"""The rules of packing against numbers worked out by hand, and against what each rule is for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.pack_layout import PackLayout

FIELDS = {
    "num_slots": 1, "max_tokens": 1, "sequence_multiple": 1, "total_multiple": 1,
    "count_multiple": 1,
}  # fmt: skip
SIZE = st.integers(1, 8)


@pytest.mark.parametrize(
    ("sizes", "sequence", "total", "count"),
    [
        ({}, 1, 1, 1),
        ({"tp": 4}, 1, 4, 1),
        ({"cp": 2}, 4, 4, 1),
        ({"cp": 4, "tp": 2}, 8, 8, 1),
        ({"cp": 2, "tp": 3}, 4, 12, 1),
        ({"cp": 3, "tp": 4}, 6, 12, 1),
        ({"fp8_multiple": 16}, 1, 16, 1),
        ({"fp8_multiple": 16, "tp": 2, "cp": 2}, 4, 64, 1),
        ({"fp8_multiple": 32, "cp": 3}, 6, 96, 1),
        ({"pp": 4}, 1, 1, 1),
        ({"pp": 4, "vpp": 2}, 1, 1, 4),
    ],
)
def test_multiples_of_a_layout(sizes: dict[str, int], sequence: int, total: int, count: int):
    layout = PackLayout.of(num_slots=2, max_tokens=100, **sizes)
    assert layout.sequence_multiple == sequence
    assert layout.total_multiple == total
    assert layout.count_multiple == count


@given(tp=SIZE, cp=SIZE, fp8=st.sampled_from([1, 16, 32]))
def test_every_rank_gets_its_share_of_every_sequence_and_of_every_micro_batch(
    tp: int, cp: int, fp8: int
):
    layout = PackLayout.of(num_slots=1, max_tokens=1, tp=tp, cp=cp, fp8_multiple=fp8)
    of_rank, rest = divmod(layout.total_multiple, tp * cp)
    assert rest == 0 and of_rank % fp8 == 0
    assert layout.sequence_multiple % (2 * cp if cp > 1 else 1) == 0


@given(pp=st.integers(2, 8), vpp=SIZE, num=st.integers(1, 50))
def test_legal_counts_are_those_that_megatron_does_not_refuse(pp: int, vpp: int, num: int):
    refused = vpp > 1 and (num < pp or 0 < num % pp < pp)
    layout = PackLayout.of(num_slots=1, max_tokens=1, pp=pp, vpp=vpp)
    assert (num % layout.count_multiple == 0) != refused


@given(length=st.integers(1, 100), cp=SIZE)
def test_a_sequence_is_padded_to_the_next_length_that_divides(length: int, cp: int):
    layout = PackLayout.of(num_slots=1, max_tokens=1, cp=cp)
    padded = layout.padded(length)
    assert padded % layout.sequence_multiple == 0
    assert 0 <= padded - length < layout.sequence_multiple


@pytest.mark.parametrize(
    ("max_tokens", "capacity"), [(1, 12), (11, 12), (12, 12), (23, 12), (24, 24), (100, 96)]
)
def test_the_limit_is_rounded_down_to_what_divides_but_not_to_nothing(
    max_tokens: int, capacity: int
):
    assert PackLayout.of(num_slots=1, max_tokens=max_tokens, tp=3, cp=2).capacity == capacity


def test_a_mesh_names_its_sizes():
    sizes = {"tp": 3, "pp": 4, "vpp": 2, "cp": 5}
    mesh = cast(Any, SimpleNamespace(parallel=ParallelConfig(**sizes), dp_size=7))
    assert PackLayout.on(mesh, max_tokens=70) == PackLayout.of(num_slots=7, max_tokens=70, **sizes)


@pytest.mark.parametrize("field", FIELDS)
def test_sizes_below_one_are_refused_by_name(field: str):
    PackLayout(**FIELDS)
    with pytest.raises(ValueError, match=f"^{field}=0: must be at least 1$"):
        PackLayout(**FIELDS | {field: 0})


def test_padded_sequences_must_be_able_to_fill_a_micro_batch():
    PackLayout(**FIELDS | {"sequence_multiple": 4, "total_multiple": 12})
    with pytest.raises(ValueError, match=r"^total_multiple=6: must be a multiple of sequence_mu"):
        PackLayout(**FIELDS | {"sequence_multiple": 4, "total_multiple": 6})

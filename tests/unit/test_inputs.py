"""A layout that does not fit is found before an engine is imported."""

from __future__ import annotations

import pytest

from megatron_srpo.config import ParallelConfig
from megatron_srpo.inputs import check_layout
from megatron_srpo.types import InputError

MODEL = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 44,
    "num_hidden_layers": 6,
}


@pytest.mark.parametrize(
    ("tp", "pp", "rollout_tp", "num_processes"),
    [(1, 1, 1, 1), (1, 1, 1, 7), (2, 1, 1, 4), (4, 3, 4, 24), (1, 6, 2, 6), (2, 2, 4, 4)],
)
def test_a_layout_that_divides_is_accepted(tp: int, pp: int, rollout_tp: int, num_processes: int):
    parallel = ParallelConfig(tp=tp, pp=pp)
    check_layout(parallel, MODEL, num_processes=num_processes, rollout_tp=rollout_tp)


@pytest.mark.parametrize(
    ("tp", "pp", "rollout_tp", "changed", "message"),
    [
        (5, 1, 1, {}, "the number of processes, 12, does not divide by parallel.tp x .* = 5"),
        (4, 2, 1, {}, "the number of processes, 12, does not divide by parallel.tp x .* = 8"),
        (1, 1, 5, {}, "the number of processes, 12, does not divide by rollout.tp = 5"),
        (3, 1, 1, {}, "num_attention_heads, 8, does not divide by parallel.tp = 3"),
        (4, 1, 1, {"num_key_value_heads": 2}, "num_key_value_heads, 2, does not divide by p"),
        (2, 1, 1, {"intermediate_size": 97}, "intermediate_size, 97, does not divide by p"),
        (2, 1, 1, {"vocab_size": 45}, "vocab_size, 45, does not divide by parallel.tp = 2"),
        (1, 4, 1, {}, "num_hidden_layers, 6, does not divide by parallel.pp = 4"),
        (1, 1, 3, {}, "num_attention_heads, 8, does not divide by rollout.tp = 3"),
        (1, 1, 4, {"num_key_value_heads": 2}, "num_key_value_heads, 2, does not divide by r"),
        (1, 1, 2, {"intermediate_size": 97}, "intermediate_size, 97, does not divide by r"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_by_its_name(
    tp: int, pp: int, rollout_tp: int, changed: dict[str, int], message: str
):
    parallel = ParallelConfig(tp=tp, pp=pp)
    with pytest.raises(InputError, match=message):
        check_layout(parallel, MODEL | changed, num_processes=12, rollout_tp=rollout_tp)

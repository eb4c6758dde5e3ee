"""A layout that does not fit is found before an engine is imported."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_srpo.config import Config
from megatron_srpo.config_sections import ParallelConfig, RolloutConfig
from megatron_srpo.inputs import check_engine_fits, check_layout
from megatron_srpo.types import InputError

MODEL = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 45,
    "num_hidden_layers": 6,
}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 10}
ONE_GROUP = {"num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("num_processes", "parallel", "rollout_tp", "changed"),
    [
        (1, {}, 1, {}),
        (7, {}, 1, {}),
        (4, {"tp": 2}, 1, {}),
        (24, {"tp": 4, "pp": 3}, 4, {}),
        (6, {"pp": 6}, 2, {}),
        (4, {"tp": 2, "pp": 2}, 4, {}),
        (12, {"tp": 2, "cp": 3}, 1, {}),
        (2, {"pp": 2, "vpp": 3}, 1, {}),
        (6, {"tp": 2, "ep": 3}, 1, EXPERTS | {"moe_intermediate_size": 5}),
        (8, {"tp": 8}, 8, ONE_GROUP),
        (2, {}, 2, ONE_GROUP | {"model_type": "olmo2"}),
    ],
)
def test_a_layout_that_divides_is_accepted(
    num_processes: int, parallel: dict[str, int], rollout_tp: int, changed: dict[str, Any]
):
    layout = ParallelConfig.model_validate(parallel)
    check_layout(layout, MODEL | changed, num_processes=num_processes, rollout_tp=rollout_tp)


@pytest.mark.parametrize(
    ("parallel", "rollout_tp", "changed", "message"),
    [
        ({"tp": 5}, 1, {}, "number of processes, 12, does not divide by parallel.tp x .* = 5"),
        ({"tp": 4, "pp": 2}, 1, {}, "number of processes, 12, .* parallel.tp x .* = 8"),
        ({"tp": 4, "cp": 2}, 1, {}, "number of processes, 12, .* x parallel.cp = 8"),
        ({"pp": 2, "ep": 4}, 1, EXPERTS, "number of processes, 12, .* x parallel.ep = 8"),
        ({}, 5, {}, "the number of processes, 12, does not divide by rollout.tp = 5"),
        ({"tp": 3}, 1, {}, "num_attention_heads, 8, does not divide by parallel.tp = 3"),
        (
            {"tp": 3},
            1,
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            "padded vocabulary, 128, does not divide by parallel.tp = 3",
        ),
        ({"tp": 4}, 1, {"num_key_value_heads": 3}, "num_key_value_heads, 3, .* parallel.tp = 4"),
        ({"tp": 2}, 1, ONE_GROUP | {"model_type": "olmo3"}, "num_key_value_heads, 1, .* = 2"),
        ({"tp": 2}, 1, {"intermediate_size": 97}, "intermediate_size, 97, does not divide by p"),
        ({"tp": 2}, 1, {"moe_intermediate_size": 5}, "moe_intermediate_size, 5, .* parallel.tp"),
        ({"pp": 4}, 1, {}, "num_hidden_layers, 6, .* parallel.pp x parallel.vpp = 4"),
        ({"pp": 2, "vpp": 2}, 1, {}, "num_hidden_layers, 6, .* parallel.pp x parallel.vpp = 4"),
        ({"vpp": 2}, 1, {}, r"parallel\.vpp=2 needs a pipeline: parallel\.pp is 1"),
        ({"ep": 4}, 1, EXPERTS, "number of experts, 6, does not divide by parallel.ep = 4"),
        ({"ep": 2}, 1, {}, r"parallel\.ep=2: the model has no experts to share"),
        ({}, 2, {"moe_intermediate_size": 5}, "moe_intermediate_size, 5, .* rollout.tp"),
        ({}, 3, {}, "num_attention_heads, 8, does not divide by rollout.tp = 3"),
        ({}, 4, {"num_key_value_heads": 3}, "num_key_value_heads, 3, .* rollout.tp = 4"),
        ({}, 2, {"intermediate_size": 97}, "intermediate_size, 97, does not divide by r"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_by_its_name(
    parallel: dict[str, int], rollout_tp: int, changed: dict[str, Any], message: str
):
    layout = ParallelConfig.model_validate(parallel)
    with pytest.raises(InputError, match=message):
        check_layout(layout, MODEL | changed, num_processes=12, rollout_tp=rollout_tp)


@pytest.mark.parametrize(
    ("tp", "num_bytes"),
    # 2 x 6 layers x heads x 16 x 4 bytes x 100 tokens
    [(1, 307_200), (2, 153_600), (4, 76_800), (8, 76_800)],
)
def test_a_process_of_an_engine_holds_its_own_heads_of_the_longest_sequence(
    tp: int, num_bytes: int
):
    """A cache is given for each process: all heads would be as many times too much."""
    model = MODEL | {"hidden_size": 128, "max_position_embeddings": 100}

    def check(size: int) -> None:
        rollout = {"tp": tp, "kv_cache_bytes": size, "max_model_len": 100}
        cfg = Config.model_construct(dtype="float32", rollout=RolloutConfig(**rollout))
        check_engine_fits(cfg, model)

    check(num_bytes)
    with pytest.raises(InputError, match=rf"100 tokens: that takes {num_bytes}$"):
        check(num_bytes - 1)

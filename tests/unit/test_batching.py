"""The invariants that `batching` states, for any lengths; packing against arrays written out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_srpo.batching import mini_batches, pack, plan_micro_batches
from tests.unit.builders import sample

LENGTHS = st.lists(st.integers(1, 40), max_size=40)
RANKS = st.integers(1, 6)
LIMITS = st.integers(1, 60)


@example([16, 16, 16, 7, 7], 2, 30)
@given(LENGTHS, RANKS, LIMITS)
def test_every_sequence_is_in_exactly_one_micro_batch(lengths: list[int], ranks: int, limit: int):
    plan = plan_micro_batches(lengths, num_ranks=ranks, max_tokens=limit)
    placed = Counter(index for rank in plan for micro_batch in rank for index in micro_batch)
    assert placed == Counter(range(len(lengths)))


@example([16, 16, 16, 7, 7], 2, 30)
@given(LENGTHS, RANKS, LIMITS)
def test_a_micro_batch_is_within_the_limit_or_one_longer_sequence(
    lengths: list[int], ranks: int, limit: int
):
    for rank in plan_micro_batches(lengths, num_ranks=ranks, max_tokens=limit):
        for micro_batch in rank:
            num_tokens = sum(lengths[index] for index in micro_batch)
            assert num_tokens <= limit or len(micro_batch) == 1


@example([16, 16, 16, 7, 7], 2, 30)
@given(LENGTHS, RANKS, LIMITS)
def test_all_ranks_have_equally_many_micro_batches(lengths: list[int], ranks: int, limit: int):
    plan = plan_micro_batches(lengths, num_ranks=ranks, max_tokens=limit)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1


@given(LENGTHS.filter(bool), RANKS, LIMITS)
def test_the_heaviest_rank_has_at_most_one_sequence_more_than_the_lightest(
    lengths: list[int], ranks: int, limit: int
):
    plan = plan_micro_batches(lengths, num_ranks=ranks, max_tokens=limit)
    loads = [sum(lengths[index] for bin in rank for index in bin) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths)


@given(LENGTHS.filter(bool), LIMITS)
def test_no_two_micro_batches_of_a_rank_alone_could_have_been_one(lengths: list[int], limit: int):
    (bins,) = plan_micro_batches(lengths, num_ranks=1, max_tokens=limit)
    totals = sorted(sum(lengths[index] for index in bin) for bin in bins)
    assert len(totals) < 2 or totals[0] + totals[1] > limit


def test_longest_sequences_go_first_and_to_the_lightest_rank():
    # 7 to rank 0, 5 and 4 to rank 1, 3 to rank 0, 2 to rank 1.
    plan = plan_micro_batches([2, 3, 4, 5, 7], num_ranks=2, max_tokens=100)
    assert plan == [[[4, 1]], [[3, 2, 0]]]


def test_equal_lengths_keep_their_order_so_every_rank_makes_the_same_plan():
    plan = plan_micro_batches([3, 3, 3, 3], num_ranks=2, max_tokens=3)
    assert plan == [[[0], [2]], [[1], [3]]]


def test_a_sequence_joins_the_first_micro_batch_with_room():
    plan = plan_micro_batches([6, 5, 4, 3, 2], num_ranks=1, max_tokens=10)
    assert plan == [[[0, 2], [1, 3, 4]]]


def test_a_sequence_that_fills_a_micro_batch_to_the_last_token_fits():
    assert plan_micro_batches([6, 4], num_ranks=1, max_tokens=10) == [[[0, 1]]]
    assert plan_micro_batches([6, 5], num_ranks=1, max_tokens=10) == [[[0], [1]]]


def test_ranks_with_fewer_micro_batches_split_their_fullest_before_they_add_empty_ones():
    # Rank 0 gets 16 16, which do not fit together; rank 1 gets 16 7 7, which would.
    plan = plan_micro_batches([16, 16, 16, 7, 7], num_ranks=2, max_tokens=30)
    assert plan == [[[0], [2]], [[3, 4], [1]]]
    plan = plan_micro_batches([5, 5, 5], num_ranks=2, max_tokens=5)
    assert plan == [[[0], [2]], [[1], []]]


def test_no_sequences_make_no_micro_batches():
    assert plan_micro_batches([], num_ranks=3, max_tokens=10) == [[], [], []]


def test_packing_lays_inputs_and_next_tokens_end_to_end():
    packed = pack([sample("x", [10, 11, 12]), sample("y", [20, 21])])
    assert packed.token_ids.tolist() == [10, 11, 20]
    assert packed.target_ids.tolist() == [11, 12, 21]
    assert packed.position_ids.tolist() == [0, 1, 0]
    assert packed.cu_seqlens.tolist() == [0, 2, 3]
    assert packed.sample_ids == ("x", "y")


def test_weight_advantage_and_logprob_stand_where_their_token_is_predicted():
    packed = pack([sample("x", [10, 11, 12]), sample("y", [20, 21])])
    assert packed.loss_weight.tolist() == pytest.approx([1.1, 2.1, 1.1])
    assert packed.advantage.tolist() == pytest.approx([1.2, 2.2, 1.2])
    assert packed.logprob.tolist() == pytest.approx([-1.3, -2.3, -1.3])


def test_no_samples_make_one_token_that_learns_nothing():
    packed = pack([])
    assert packed.token_ids.tolist() == packed.target_ids.tolist() == [0]
    assert packed.loss_weight.tolist() == packed.advantage.tolist() == [0]
    assert packed.cu_seqlens.tolist() == [0, 1]
    assert packed.sample_ids == ()


def test_arrays_have_the_types_that_engines_take():
    for packed in (pack([]), pack([sample("x", [1, 2, 3])])):
        for name in ("token_ids", "target_ids", "position_ids", "cu_seqlens"):
            assert getattr(packed, name).dtype == np.int32
        for name in ("loss_weight", "advantage", "logprob"):
            assert getattr(packed, name).dtype == np.float32


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=9), min_size=1, max_size=6))
def test_every_sequence_can_be_read_back_from_a_packed_one(sequences: list[list[int]]):
    packed = pack([sample(str(i), tokens) for i, tokens in enumerate(sequences)])
    bounds = packed.cu_seqlens.tolist()
    assert bounds[-1] == len(packed.token_ids)
    for tokens, start, end in zip(sequences, bounds[:-1], bounds[1:], strict=True):
        assert [*packed.token_ids[start:end], packed.target_ids[end - 1]] == tokens
        assert packed.target_ids[start:end].tolist() == tokens[1:]
        assert packed.position_ids[start:end].tolist() == [*range(len(tokens) - 1)]


def test_a_samples_turn_names_its_update_in_the_order_of_the_samples():
    samples = [sample(f"{turn}", [1, 2], turn=turn) for turn in (5, 0, 3, 1, 4)]
    ids = [[s.id for s in batch] for batch in mini_batches(samples, 3)]
    assert ids == [["0", "3"], ["1", "4"], ["5"]]
    assert [len(batch) for batch in mini_batches(samples[:1], 4)] == [0, 1, 0, 0]
    assert mini_batches(samples, 1) == [samples]

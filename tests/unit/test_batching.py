"""The invariants that `batching` states, for any lengths and layouts, each on its own; plans and
packing against ones written out."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from math import ceil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_srpo.batching import mini_batches, pack, plan_micro_batches
from megatron_srpo.pack_layout import PackLayout
from tests.unit.builders import sample

LENGTHS = st.lists(st.integers(1, 40), max_size=40)
LAYOUTS = st.builds(
    PackLayout.of,
    num_slots=st.integers(1, 6),
    max_tokens=st.integers(1, 80),
    tp=st.integers(1, 3),
    cp=st.integers(1, 3),
    pp=st.integers(1, 3),
    vpp=st.integers(1, 2),
)
SEQUENCES = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=9), max_size=6)


def plain(num_slots: int = 1, max_tokens: int = 1) -> PackLayout:
    """Nothing must divide."""
    return PackLayout.of(num_slots=num_slots, max_tokens=max_tokens)


def loads_of(lengths: list[int], layout: PackLayout) -> list[list[int]]:
    """[slot][micro-batch] tokens, sequences padded"""
    return [
        [sum(layout.padded(lengths[index]) for index in micro_batch) for micro_batch in slot]
        for slot in plan_micro_batches(lengths, layout)
    ]


@given(LENGTHS, LAYOUTS)
def test_every_sequence_is_in_exactly_one_micro_batch(lengths: list[int], layout: PackLayout):
    plan = plan_micro_batches(lengths, layout)
    placed = Counter(index for slot in plan for micro_batch in slot for index in micro_batch)
    assert placed == Counter(range(len(lengths)))


@example([4, 4, 4, 4, 3], plain(max_tokens=10))
@given(LENGTHS, LAYOUTS)
def test_a_micro_batch_is_within_the_limit_or_one_longer_sequence(
    lengths: list[int], layout: PackLayout
):
    for micro_batch in chain(*plan_micro_batches(lengths, layout)):
        samples = [sample(str(i), [1] * (lengths[i] + 1)) for i in micro_batch]
        num_tokens = len(pack(samples, layout).token_ids)
        shortest_there_is = layout.total_multiple
        assert num_tokens <= max(layout.max_tokens, shortest_there_is) or len(micro_batch) == 1


@given(LENGTHS, LAYOUTS)
def test_all_slots_have_equally_many_micro_batches_a_legal_number(
    lengths: list[int], layout: PackLayout
):
    plan = plan_micro_batches(lengths, layout)
    assert len(plan) == layout.num_slots
    (count,) = {len(slot) for slot in plan}
    assert count % layout.count_multiple == 0


@given(LENGTHS, LAYOUTS)
def test_no_micro_batch_is_empty_while_another_could_be_split(
    lengths: list[int], layout: PackLayout
):
    sizes = {len(micro_batch) for micro_batch in chain(*plan_micro_batches(lengths, layout))}
    assert 0 not in sizes or sizes <= {0, 1}


@given(LENGTHS, LAYOUTS)
def test_no_slot_is_idle_while_another_has_two_more(lengths: list[int], layout: PackLayout):
    busy = [sum(map(bool, slot)) for slot in plan_micro_batches(lengths, layout)]
    assert max(busy) - min(busy) <= 1


@given(LENGTHS.filter(bool), LAYOUTS)
def test_two_slots_differ_by_at_most_one_sequence(lengths: list[int], layout: PackLayout):
    loads = [sum(slot) for slot in loads_of(lengths, layout)]
    assert max(loads) - min(loads) <= layout.padded(max(lengths))


@given(LENGTHS.filter(bool), LAYOUTS)
def test_two_micro_batches_differ_by_at_most_one_sequence(lengths: list[int], layout: PackLayout):
    loads = [*chain(*loads_of(lengths, layout))]
    assert max(loads) - min(loads) <= layout.padded(max(lengths))


@given(LENGTHS, LAYOUTS)
def test_what_slots_compute_at_a_time_is_heavier_than_all_that_comes_later(
    lengths: list[int], layout: PackLayout
):
    rounds = zip(*loads_of(lengths, layout), strict=True)
    assert all(min(one) >= max(later) for one, later in pairwise(rounds))


@given(LENGTHS, LAYOUTS)
def test_micro_batches_are_at_most_twice_as_many_as_their_tokens_need(
    lengths: list[int], layout: PackLayout
):
    sizes = [min(layout.padded(length), layout.capacity) for length in lengths]
    enough = ceil(2 * sum(sizes) / layout.capacity)
    step = layout.num_slots * layout.count_multiple
    num = sum(len(slot) for slot in plan_micro_batches(lengths, layout))
    assert num <= ceil(enough / step) * step


def test_longest_sequences_go_first_and_to_the_lightest_micro_batch():
    # 7 to one, 5 and 4 to the other, 3 to the first, 2 to the second.
    plan = plan_micro_batches([2, 3, 4, 5, 7], plain(num_slots=2, max_tokens=100))
    assert plan == [[[4, 1]], [[3, 2, 0]]]


def test_equal_lengths_keep_their_order_so_every_rank_makes_the_same_plan():
    plan = plan_micro_batches([3, 3, 3, 3], plain(num_slots=2, max_tokens=3))
    assert plan == [[[0], [2]], [[1], [3]]]


def test_a_sequence_that_fills_a_micro_batch_to_the_last_token_fits():
    assert plan_micro_batches([6, 4], plain(max_tokens=10)) == [[[0, 1]]]
    assert plan_micro_batches([6, 5], plain(max_tokens=10)) == [[[0], [1]]]


def test_micro_batches_are_as_few_as_do_not_overflow():
    # 19 tokens would go into two, but 4 + 4 and 4 + 4 leave no room for 3.
    assert plan_micro_batches([4, 4, 4, 4, 3], plain(max_tokens=10)) == [[[0, 3], [1, 4], [2]]]
    assert plan_micro_batches([5, 5, 5, 5], plain(max_tokens=10)) == [[[0, 2], [1, 3]]]


def test_padding_counts_against_the_limit():
    in_fours = PackLayout.of(num_slots=1, max_tokens=8, cp=2)
    assert plan_micro_batches([4, 4], in_fours) == [[[0, 1]]]
    assert plan_micro_batches([5, 3], in_fours) == [[[0], [1]]]
    # 9 tokens are allowed, but a micro-batch of 9 would be padded to 12.
    in_threes = PackLayout.of(num_slots=1, max_tokens=11, tp=3)
    assert plan_micro_batches([5, 4], in_threes) == [[[0, 1]]]
    assert plan_micro_batches([5, 5], in_threes) == [[[0], [1]]]


def test_micro_batches_are_raised_to_what_divides_by_making_all_lighter():
    # Two would hold these; the pipeline takes three, or six over two slots.
    lengths = [6, 5, 4, 3, 2, 1]
    in_threes = PackLayout.of(num_slots=1, max_tokens=11, pp=3, vpp=2)
    assert plan_micro_batches(lengths, in_threes) == [[[0, 5], [1, 4], [2, 3]]]
    in_sixes = PackLayout.of(num_slots=2, max_tokens=11, pp=3, vpp=2)
    assert plan_micro_batches(lengths, in_sixes) == [[[0], [3], [5]], [[1], [2], [4]]]


def test_in_a_round_the_slot_with_fewest_squares_gets_most():
    # Rounds of 8 and 4 + 4, then 7 and 4 + 3, whose squares are 64 and 32, then 49 and 25.
    plan = plan_micro_batches([8, 7, 4, 4, 4, 3], plain(num_slots=2, max_tokens=8))
    assert plan == [[[0], [3, 5]], [[2, 4], [1]]]


def test_only_where_sequences_are_too_few_are_micro_batches_empty():
    plan = plan_micro_batches([5, 5, 5], plain(num_slots=2, max_tokens=5))
    assert plan == [[[0], [2]], [[1], []]]


def test_no_sequences_make_no_micro_batches():
    assert plan_micro_batches([], plain(num_slots=3, max_tokens=10)) == [[], [], []]


def test_the_limit_may_be_smaller_than_any_sequence():
    assert plan_micro_batches([3, 9], plain()) == [[[1], [0]]]


def test_packing_lays_inputs_and_next_tokens_end_to_end():
    packed = pack([sample("x", [10, 11, 12]), sample("y", [20, 21])], plain())
    assert packed.token_ids.tolist() == [10, 11, 20]
    assert packed.target_ids.tolist() == [11, 12, 21]
    assert packed.position_ids.tolist() == [0, 1, 0]
    assert packed.cu_seqlens.tolist() == [0, 2, 3]
    assert packed.sample_ids == ("x", "y")


def test_weight_advantage_and_logprob_stand_where_their_token_is_predicted():
    packed = pack([sample("x", [10, 11, 12]), sample("y", [20, 21])], plain())
    assert packed.loss_weight.tolist() == pytest.approx([1.1, 2.1, 1.1])
    assert packed.advantage.tolist() == pytest.approx([1.2, 2.2, 1.2])
    assert packed.logprob.tolist() == pytest.approx([-1.3, -2.3, -1.3])


def test_each_sequence_is_padded_at_its_end_and_the_last_one_for_all():
    # Sequences of a multiple of 4, nine tokens' worth of a multiple of 12.
    layout = PackLayout.of(num_slots=1, max_tokens=100, cp=2, tp=3)
    packed = pack([sample("x", [10, 11, 12]), sample("y", [20, 21])], layout)
    assert packed.token_ids.tolist() == [10, 11, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0]
    assert packed.target_ids.tolist() == [11, 12, 0, 0, 21, 0, 0, 0, 0, 0, 0, 0]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert packed.cu_seqlens.tolist() == [0, 4, 12]
    assert np.flatnonzero(packed.loss_weight).tolist() == [0, 1, 4]
    assert np.flatnonzero(packed.advantage).tolist() == [0, 1, 4]
    assert np.flatnonzero(packed.logprob).tolist() == [0, 1, 4]


def test_no_samples_make_the_shortest_micro_batch_which_learns_nothing():
    for layout, num in ((plain(), 1), (PackLayout.of(num_slots=1, max_tokens=1, cp=2, tp=3), 12)):
        packed = pack([], layout)
        assert packed.token_ids.tolist() == packed.target_ids.tolist() == [0] * num
        assert packed.loss_weight.tolist() == packed.advantage.tolist() == [0] * num
        assert packed.logprob.tolist() == [0] * num
        assert packed.position_ids.tolist() == [*range(num)]
        assert packed.cu_seqlens.tolist() == [0, num]
        assert packed.sample_ids == ()


def test_arrays_have_the_types_that_engines_take():
    for packed in (pack([], plain()), pack([sample("x", [1, 2, 3])], plain())):
        for name in ("token_ids", "target_ids", "position_ids", "cu_seqlens"):
            assert getattr(packed, name).dtype == np.int32
        for name in ("loss_weight", "advantage", "logprob"):
            assert getattr(packed, name).dtype == np.float32


@given(SEQUENCES, LAYOUTS)
def test_every_sequence_and_every_micro_batch_has_a_length_that_divides(
    sequences: list[list[int]], layout: PackLayout
):
    packed = pack([sample("", tokens) for tokens in sequences], layout)
    assert not (np.diff(packed.cu_seqlens) % layout.sequence_multiple).any()
    assert len(packed.token_ids) > 0
    assert len(packed.token_ids) % layout.total_multiple == 0


@given(SEQUENCES.filter(bool), LAYOUTS)
def test_no_sequence_is_padded_further_than_it_must_be_and_the_last_one_for_all(
    sequences: list[list[int]], layout: PackLayout
):
    packed = pack([sample("", tokens) for tokens in sequences], layout)
    padding = np.diff(packed.cu_seqlens) - [len(tokens) - 1 for tokens in sequences]
    assert (padding >= 0).all()
    assert (padding[:-1] < layout.sequence_multiple).all()
    assert padding[-1] < layout.sequence_multiple + layout.total_multiple
    assert len(packed.token_ids) - layout.total_multiple < sum(
        layout.padded(len(tokens) - 1) for tokens in sequences
    )


@given(SEQUENCES, LAYOUTS)
def test_every_sequence_can_be_read_back_and_padding_weighs_nothing(
    sequences: list[list[int]], layout: PackLayout
):
    packed = pack([sample(str(i), tokens) for i, tokens in enumerate(sequences)], layout)
    bounds = packed.cu_seqlens.tolist()
    assert bounds[-1] == len(packed.token_ids)
    is_padding = np.ones(len(packed.token_ids), bool)
    for tokens, (start, end) in zip(sequences, pairwise(bounds), strict=bool(sequences)):
        here = slice(start, start + len(tokens) - 1)
        is_padding[here] = False
        assert [*packed.token_ids[here], packed.target_ids[here][-1]] == tokens
        assert packed.target_ids[here].tolist() == tokens[1:]
        assert packed.position_ids[start:end].tolist() == [*range(end - start)]
    for name in ("token_ids", "target_ids", "loss_weight", "advantage", "logprob"):
        assert not getattr(packed, name)[is_padding].any()


def test_a_samples_turn_names_its_update_in_the_order_of_the_samples():
    samples = [sample(f"{turn}", [1, 2], turn=turn) for turn in (5, 0, 3, 1, 4)]
    ids = [[s.id for s in batch] for batch in mini_batches(samples, 3)]
    assert ids == [["0", "3"], ["1", "4"], ["5"]]
    assert [len(batch) for batch in mini_batches(samples[:1], 4)] == [0, 1, 0, 0]
    assert mini_batches(samples, 1) == [samples]

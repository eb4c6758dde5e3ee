"""Seeds name draws: equal names draw equally, different names differently, in every release."""

from __future__ import annotations

import itertools

from megatron_srpo.seeding import counter_seed


def test_the_hash_is_the_one_that_old_runs_were_drawn_with():
    assert counter_seed(0, "0/p/base/0") == 4278037814457233437
    assert counter_seed(7, 12, "row3", "localize", 0) == 4521843652833838437


def test_different_names_have_different_seeds():
    names = [
        *itertools.product((0, 1, 11), (0, 1, 11), ("a", "b", "1"), ("base", "suffix"), (0, 1))
    ]
    assert len({counter_seed(*name) for name in names}) == len(names)


def test_words_do_not_run_together():
    seeds = {
        counter_seed(1, 11),
        counter_seed(11, 1),
        counter_seed(111),
        counter_seed("1", "11"),
        counter_seed("1", 11),
        counter_seed("1, 11"),
        counter_seed("1', '11"),
    }
    assert len(seeds) == 7


def test_seeds_fit_a_signed_64_bit_integer_and_use_all_63_bits():
    seeds = [counter_seed(number) for number in range(400)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Each bit is set in half of them: 200 expected, standard deviation 10.
    for bit in range(63):
        assert 140 < sum(seed >> bit & 1 for seed in seeds) < 260

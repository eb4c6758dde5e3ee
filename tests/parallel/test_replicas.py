"""What the ranks of a slot and of a replica share: samples, rewards, resets, failures."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_srpo.types import AlarmError, Score
from tests.parallel import jobs, judge_jobs
from tests.parallel.pool import Pool
from tests.tiny import random_samples


@pytest.mark.parametrize(
    ("num", "tp", "pp", "rollout_tp"), [(4, 2, 1, 1), (4, 1, 2, 2), (4, 2, 2, 4)]
)
def test_a_sample_reaches_all_ranks_of_one_copy_of_the_policy(
    pool: Pool, num: int, tp: int, pp: int, rollout_tp: int
) -> None:
    answers = pool.run(num, jobs.exchanged, tp=tp, pp=pp, rollout_tp=rollout_tp)
    of_slot: dict[int, list[str]] = {}
    for slot, ids, denominator in answers:
        assert denominator == jobs.NUM_SAMPLES
        assert of_slot.setdefault(slot, ids) == ids, "ranks of one slot hold the same batch"
    assert len(of_slot) == num // (tp * pp)
    everything = sorted(id for ids in of_slot.values() for id in ids)
    assert everything == sorted(s.id for s in random_samples(jobs.NUM_SAMPLES, seed=1))


def test_samples_without_advantage_travel_only_where_the_loss_asks_for_them(pool: Pool) -> None:
    for with_silent, expected in ((False, 3), (True, 5)):
        found = pool.run(2, jobs.silent_samples, with_silent)
        assert sum(num_sent for num_sent, _ in found) == expected
        assert [denominator for _, denominator in found] == [6.0, 6.0]


def test_the_leader_s_reward_is_its_replica_s(pool: Pool) -> None:
    scores = pool.run(4, judge_jobs.rewarded_by_rank, tp=1, rollout_tp=2)
    assert scores == [0.0, 0.0, 2.0, 2.0]


def test_a_reward_that_raises_on_the_leader_raises_the_same_on_its_ranks_and_hangs_none(
    pool: Pool,
) -> None:
    """All of them have drawn what their engine gave: it takes its steps on all ranks."""
    found = pool.run(2, judge_jobs.reward_raises, rollout_tp=2)
    assert found == [("the reward of prompt 'p' raised KeyError: 'no such answer'", 3)] * 2


def test_an_engine_that_is_stopped_stops_its_ranks_and_none_waits_for_scores(pool: Pool) -> None:
    said = pool.run(2, judge_jobs.engine_stops, rollout_tp=2)
    assert said == ["stopped, then 3 scores"] * 2


def test_who_waits_for_the_leader_s_verdicts_is_in_a_phase_with_a_deadline_for_that(
    pool: Pool,
) -> None:
    leader, other = pool.run(2, judge_jobs.waits_in_phase, rollout_tp=2)
    assert "time/reward_s" in leader and "time/wait_s" in other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "raised TypeError: it must give a Score, not None"),
        (0.5, "raised TypeError: it must give a Score, not 0.5"),
        (
            Score(value=float("nan"), correct=False),
            "raised ValueError: the value of a Score must be finite, not nan",
        ),
        (Score(value=np.float32(1), correct=np.bool_(True)), "float bool"),  # type: ignore[arg-type]
    ],
)
def test_a_reward_gives_a_plain_finite_score_or_stops_the_run(
    pool: Pool, given: object, message: str
) -> None:
    for found in pool.run(2, judge_jobs.reward_gives, given, rollout_tp=2):
        assert found.endswith(message)


def test_only_the_leader_s_rule_is_asked_and_its_ranks_generate_what_it_asks_for(
    pool: Pool,
) -> None:
    found = pool.run(4, jobs.reset_by_rank, rollout_tp=2)
    for rank, (thought, num_asked, requests) in enumerate(found):
        leader = rank // 2 * 2
        assert thought == leader
        assert num_asked == (rank == leader)
        assert requests == [f"{leader}/{number}/{i}" for number in range(2) for i in range(3)]


def test_a_rule_that_raises_on_the_leader_raises_the_same_on_its_ranks_and_hangs_none(
    pool: Pool,
) -> None:
    messages = pool.run(2, jobs.rule_raises, 0, rollout_tp=2)
    assert messages == ["the reset rule raised OSError: no such file"] * 2


def test_a_rule_that_would_raise_on_another_rank_is_not_asked_there(pool: Pool) -> None:
    assert pool.run(2, jobs.rule_raises, 1, rollout_tp=2) == ["no alarm"] * 2


def test_a_first_all_reduce_is_right_or_names_who_does_not_come(pool: Pool) -> None:
    assert pool.run(2, jobs.all_reduce_checked) == ["right"] * 2
    first, _ = pool.run(2, jobs.all_reduce_checked, 1)
    assert first.startswith("not all ranks take part: ") and "1" in first
    for heard in pool.run(2, jobs.all_reduce_checked, None, 1):
        assert heard.startswith("an all-reduce whose sum is 3 gives on ") and ": 9.0" in heard


def test_a_failed_rank_fails_its_job_and_leaves_the_pool_usable(pool: Pool) -> None:
    with pytest.raises(AlarmError, match="rank 1 fails"):
        pool.run(2, jobs.fail_on_rank_1)
    assert pool.run(2, jobs.rank_sum) == [1, 1]

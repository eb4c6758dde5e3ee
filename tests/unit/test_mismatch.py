"""When do log-probs of trainer and rollout engine that differ warn, and when do they stop a run?"""

from __future__ import annotations

import pytest

from megatron_srpo.config_precision import MismatchConfig
from megatron_srpo.mismatch import MismatchAlarm
from megatron_srpo.types import AlarmError

BOUNDS = MismatchConfig(max_mean=0.1, max_kl=0.01, patience=3)


def metrics(mean: float = 0.01, kl: float = 0.001, largest: float = 5.0) -> dict[str, float]:
    return {
        "mismatch/logprob_abs_mean": mean,
        "mismatch/kl_k3": kl,
        "mismatch/logprob_abs_max": largest,
    }


def heard(steps: list[dict[str, float]], max_token: float | None = None) -> list[str | None]:
    alarm = MismatchAlarm(BOUNDS, max_token)
    return [alarm.hear(step, each) for step, each in enumerate(steps)]


def test_within_the_bounds_nothing_is_said():
    assert heard([metrics(mean=0.1, kl=0.01)] * 9) == [None] * 9


def test_so_many_steps_in_a_row_above_a_bound_stop_the_run():
    with pytest.raises(
        AlarmError,
        match=r"step 2: .*in 3 steps in a row .*: mismatch/kl_k3 is 0.011 .mismatch.max_kl=0.01",
    ):
        heard([metrics(kl=0.011)] * 3)


def test_a_step_within_the_bounds_begins_the_count_anew():
    above = metrics(mean=0.11)
    assert heard([above, above, metrics(), above, above]) == [None] * 5


def test_the_bounds_count_together():
    with pytest.raises(AlarmError, match="step 2"):
        heard([metrics(mean=0.11), metrics(kl=0.011), metrics(mean=0.12)])


def test_one_step_far_above_a_bound_is_warned_of():
    said = heard([metrics(mean=1.01), metrics()])
    assert (
        said[0] and "far apart: mismatch/logprob_abs_mean is 1 (mismatch.max_mean=0.1)" in said[0]
    )
    assert said[1] is None
    assert heard([metrics(mean=0.99)]) == [None]


def test_what_is_not_a_number_is_far_above():
    assert heard([metrics(kl=float("nan"))])[0]


def test_a_step_that_trained_on_nothing_says_nothing_and_counts_for_nothing():
    above: dict[str, float] = metrics(mean=0.11)
    with pytest.raises(AlarmError, match="step 3"):
        heard([above, above, {"loss": 0.0}, above])


@pytest.mark.parametrize("largest", [1.1e-5, float("nan")])
def test_where_tokens_are_bounded_one_token_stops_the_run(largest: float):
    with pytest.raises(AlarmError, match=r"step 0: .* nats on a trained token .*=1e-05"):
        heard([metrics(mean=0.0, kl=0.0, largest=largest)], max_token=1e-5)

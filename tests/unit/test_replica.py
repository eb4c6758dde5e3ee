"""What a leader makes of its reward: an alarm with the traceback, or a line in the log."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import numpy as np
import pytest

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.replica import MOST_LINES, LeaderJudge
from megatron_srpo.rewards.judge import judge_named
from megatron_srpo.types import AlarmError, Prompt, Score
from tests.unit.builders import in_place

FILE = """
from megatron_srpo.types import Score

def reward(prompt, response):
    return Score(value={"right": 1.0}[response], correct=True)
"""


def prompt(id: str = "p") -> Prompt:
    return Prompt(id=id, text="", token_ids=np.zeros(1, np.int32), answer="")


def test_a_reward_that_raises_in_its_process_is_an_alarm_with_that_process_s_traceback(
    tmp_path: Path, mesh: Mesh
):
    (tmp_path / "reward_that_raises.py").write_text(FILE)
    name = f"{tmp_path}/reward_that_raises.py:reward"
    inner = judge_named(name, timeout_s=20, num_workers=2)
    judge = LeaderJudge(inner=inner, mesh=mesh)
    (score,) = judge.judge([(prompt(), "right")])
    assert score.correct
    with pytest.raises(AlarmError) as alarm:
        judge.judge([(prompt(), "wrong")])
    assert str(alarm.value) == "the reward of prompt 'p' raised KeyError: 'wrong'"
    logged = "".join(traceback.format_exception(alarm.value))
    assert 'return Score(value={"right": 1.0}[response], correct=True)' in logged


def test_rewards_that_failed_are_told_once_the_first_so_many_by_name(
    mesh: Mesh, caplog: pytest.LogCaptureFixture
):
    def failing(prompt: Prompt, response: str) -> Score:
        return Score(value=0.0, correct=False, failure=response or None)

    judge = LeaderJudge(inner=in_place(failing), mesh=mesh)
    judge.judge((prompt(f"p{number}"), "broken") for number in range(MOST_LINES + 2))
    judge.judge([(prompt("well"), "")])
    with caplog.at_level(logging.WARNING):
        judge.tell_failures()
        judge.tell_failures()
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "the reward of prompt 'p0' failed: broken"
    assert len(told) == MOST_LINES + 1
    assert told[-1] == "... and 2 more, which the journal names"

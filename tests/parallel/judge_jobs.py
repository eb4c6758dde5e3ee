"""Jobs in which a rollout engine's ranks ask a reward: its leader asks, the others wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.replica import LeaderJudge
from megatron_srpo.stopping import StopRequested
from megatron_srpo.stopwatch import Stopwatch
from megatron_srpo.types import AlarmError, Prompt, Score
from tests.parallel.jobs import PROMPT
from tests.unit.builders import in_place

RIGHT = Score(value=1.0, correct=True)


def rewarded_by_rank(mesh: Mesh) -> float:
    def reward(prompt: Prompt, response: str) -> Score:
        return Score(value=float(mesh.rank), correct=False)

    (score,) = LeaderJudge(inner=in_place(reward), mesh=mesh).judge([(PROMPT, "")])
    return score.value


class Engine:
    """Items that all ranks of a replica must draw to the end, unless it stops them all."""

    def __init__(self, *, stops: bool = False) -> None:
        self.num_drawn, self._stops = 0, stops

    def __iter__(self) -> Iterator[tuple[Prompt, str]]:
        for _ in range(3):
            self.num_drawn += 1
            yield PROMPT, ""
        if self._stops:
            raise StopRequested


def reward_raises(mesh: Mesh) -> tuple[str, int]:
    """(what is said of it, how many items this rank has drawn)"""

    def reward(prompt: Prompt, response: str) -> Score:
        raise KeyError("no such answer")

    engine = Engine()
    try:
        LeaderJudge(inner=in_place(reward), mesh=mesh).judge(engine)
    except AlarmError as alarm:
        return str(alarm), engine.num_drawn
    return "no alarm", engine.num_drawn


def engine_stops(mesh: Mesh) -> str:
    judge = LeaderJudge(inner=in_place(lambda prompt, response: RIGHT), mesh=mesh)
    try:
        judge.judge(Engine(stops=True))
    except StopRequested:
        return f"stopped, then {len(judge.judge(Engine()))} scores"
    return "went on"


def waits_in_phase(mesh: Mesh) -> list[str]:
    """Phases of which this rank took time while its leader's reward took a while."""

    def reward(prompt: Prompt, response: str) -> Score:
        time.sleep(0.1)
        return RIGHT

    watch = Stopwatch()
    LeaderJudge(inner=in_place(reward), mesh=mesh, stopwatch=watch).judge([(PROMPT, "")])
    return [name for name, seconds in watch.take().items() if seconds > 0.05]


def reward_gives(mesh: Mesh, given: object) -> str:
    def reward(prompt: Prompt, response: str) -> Any:
        return given

    try:
        (score,) = LeaderJudge(inner=in_place(reward), mesh=mesh).judge([(PROMPT, "")])
    except AlarmError as alarm:
        return str(alarm)
    return f"{type(score.value).__name__} {type(score.correct).__name__}"

"""A run that is asked to stop while it generates goes on with what it had finished."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_srpo.kept import read_kept
from megatron_srpo.types import Completion, Request
from tests.survival.matrix import Ground, Left

STEP = 3


def ask_in_the_middle(rank: int) -> None:
    """The first rank is told to stop when a response of that step is finished, and then waits until
    the ranks may have agreed on where."""
    from megatron_srpo.engines.vllm.generator import VllmGenerator

    generate = VllmGenerator.generate

    def generated(engine: VllmGenerator, requests: Sequence[Request]) -> Iterator[Completion]:
        for index, completion in enumerate(generate(engine, requests)):
            yield completion
            is_base = completion.request_id.startswith(f"{STEP}/") and requests[0].purpose == "base"
            if rank == 0 and is_base and index == 0:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(2)

    VllmGenerator.generate = generated


def num_drawn(said: Path, *, attempt: int) -> int:
    """Requests to the engines for that step's rollouts and resets."""
    rows = map(json.loads, (said / "drawn.jsonl").read_text().splitlines())
    return sum(
        row["requests"]
        for row in rows
        if (row["attempt"], row["step"]) == (attempt, STEP) and row["purpose"] != "eval"
    )


def test_finished_responses_of_a_stopped_step_are_not_drawn_again(ground: Ground) -> None:
    run, said = ground.run("stopped"), ground.folder / "stopped.said"
    with ground.start("stopped", 0, prepare=ask_in_the_middle) as attempt:
        assert attempt.finish() == [75, 75], attempt.said()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == f"{STEP:06d}"
    assert len([*(run / "kept").iterdir()]) == 2
    num_kept = sum(not c.request_id.startswith("eval/") for c in read_kept(run / "kept").values())
    assert num_kept > 0
    with ground.start("stopped", 1) as attempt:
        assert attempt.finish() == [0, 0], attempt.said()
    right = num_drawn(ground.folder / "alone.said", attempt=0)
    assert num_drawn(said, attempt=1) == right - num_kept
    left = Left.of(run)
    assert left.names == ground.right.names
    for name in ("step", "tokens/base", "tokens/suffix", "reward/mean"):
        # Nothing is drawn otherwise; other neighbours in a batch may round otherwise.
        assert [line.get(name) for line in left.metrics] == [
            line.get(name) for line in ground.right.metrics
        ], name

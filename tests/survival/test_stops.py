"""A run that is asked to stop while it generates goes on with what it had finished."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence

from megatron_srpo.types import Completion, Request
from tests.survival.matrix import Ground, Left

STEP, NUM_BEFORE = 3, 2


def ask_in_the_middle(rank: int) -> None:
    """The first rank is told to stop when some suffixes of a step are finished, and then waits
    until the ranks may have agreed on where."""
    from megatron_srpo.engines.vllm.generator import VllmGenerator

    generate = VllmGenerator.generate

    def generated(engine: VllmGenerator, requests: Sequence[Request]) -> Iterator[Completion]:
        for index, completion in enumerate(generate(engine, requests)):
            yield completion
            is_suffix = completion.request_id.startswith(f"{STEP}/") and "/suffix/" in (
                completion.request_id
            )
            if rank == 0 and is_suffix and index == NUM_BEFORE:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(2)

    VllmGenerator.generate = generated


def test_finished_responses_of_a_stopped_step_are_not_drawn_again(ground: Ground) -> None:
    run = ground.run("stopped")
    with ground.start("stopped", 0, prepare=ask_in_the_middle) as attempt:
        assert attempt.finish() == [75, 75], attempt.said()
    assert len([*(run / "kept").iterdir()]) == 2
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == f"{STEP:06d}"
    with ground.start("stopped", 1) as attempt:
        assert attempt.finish() == [0, 0], attempt.said()
    drawn = (ground.folder / "stopped.said" / "drawn.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, drawn) if r["step"] == STEP and r["purpose"] != "eval"]
    before, after = (
        sum(row["requests"] for row in rows if row["attempt"] == attempt) for attempt in (0, 1)
    )
    assert {row["purpose"] for row in rows if row["attempt"] == 1} <= {"suffix", "extra/suffix"}
    assert 0 < after < before
    left, right = Left.of(run), ground.right
    assert left.names == right.names
    for name in ("step", "tokens/base", "tokens/suffix", "reward/mean"):
        # Nothing is drawn otherwise; other neighbours in a batch may round otherwise.
        assert [line.get(name) for line in left.metrics] == [
            line.get(name) for line in right.metrics
        ], name

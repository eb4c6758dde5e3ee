"""A disk that refuses stops a run in one line on every rank; with room again it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_srpo.checkpoint_store import find
from tests.survival.faults import RefusesWhen
from tests.survival.matrix import Ground, Left


@contextlib.contextmanager
def refused(
    ground: Ground, run: str, number: int, fault: RefusesWhen, *more: str
) -> Iterator[list[str]]:
    """What each rank says that was started with the fault; room is again afterwards."""
    with ground.start(run, number, *more, prepare=fault) as attempt:
        codes = attempt.finish()
        said = [attempt.said(rank) for rank in range(len(codes))]
    if fault.read_only is not None:
        fault.read_only.chmod(0o755)
    print(f"{fault.function}: exit codes {codes}", *said, sep="\n")
    code = 2 if fault.function == "load_config" else 3
    assert codes == [code] * len(codes)
    assert all("Traceback" not in words for words in said)
    yield said


def test_whatever_cannot_be_written_the_run_says_so_and_goes_on_when_it_can(
    ground: Ground,
) -> None:
    """One run: its disk is full while it journals, while writers of a checkpoint write, while
    metrics are written and while the policy is exported; folders can only be read in between."""
    run = ground.run("refused")
    checkpoints = run / "checkpoints"
    journal = RefusesWhen("megatron_srpo.journal", "Journal.write", occurrence=2, rank=1)
    with refused(ground, "refused", 0, journal) as said:
        assert "rollouts/000001-00001-of-00002.npz could not be written: a file may not" in said[1]
        assert "because of rank 1" in said[0] and "of-00002.npz could not be written" in said[0]
        assert "stopped: rank 1" in (run / "log.txt").read_text()
    writers = RefusesWhen(
        "megatron_srpo.engines.megatron.checkpoint", "CheckpointWriter.begin", occurrence=2, rank=1
    )
    synchronous = "checkpoint.asynchronous=false"
    with refused(ground, "refused", 1, writers, synchronous) as said:
        for words in said:
            assert "checkpoints/000004.partial/megatron could not be written: Runtime" in words
        assert [*find(checkpoints)[0]] == [2]
    folder = RefusesWhen(
        "megatron_srpo.checkpoints", "Checkpoints._begin", occurrence=1, rank=0,
        read_only=checkpoints,
    )  # fmt: skip
    with refused(ground, "refused", 2, folder) as said:
        assert all("checkpoints could not be written: it may not be" in words for words in said)
        assert [*find(checkpoints)[0]] == [2]
    start = RefusesWhen(
        "megatron_srpo.__main__", "load_config", occurrence=1, rank=0, read_only=run
    )
    with refused(ground, "refused", 3, start) as said:
        assert f"error: run_dir={run}: [Errno 13] Permission denied" in said[0]
    metrics = RefusesWhen("megatron_srpo.telemetry", "Telemetry.log", occurrence=3, rank=0)
    with refused(ground, "refused", 4, metrics) as said:
        assert "metrics.jsonl could not be written: a file may not grow" in said[0]
    export = RefusesWhen("megatron_srpo.train", "save_hf", occurrence=1, rank=0)
    with refused(ground, "refused", 5, export) as said:
        assert "hf could not be written: a file may not grow that large" in said[0]
    with ground.start("refused", 6) as attempt:
        assert attempt.finish() == [0, 0], attempt.said()
    assert Left.of(run).differences(ground.right) == []

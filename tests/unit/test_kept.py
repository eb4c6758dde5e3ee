"""What a stopped step had finished is not drawn again, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.kept import KeepingGenerator, drop_before, read_kept, write_kept
from megatron_srpo.types import Completion, Request


def request(id: str) -> Request:
    context = np.array([ord("a")], dtype=np.int32)
    return Request(
        id=id, purpose="base", context=context, max_tokens=9, temperature=1.0, seed=len(id)
    )


def engine() -> FakeGenerator:
    return FakeGenerator(lambda context, rng: "x" * rng.randrange(1, 8))


def fields(completion: Completion) -> list[object]:
    return [np.asarray(getattr(completion, name)).tolist() for name in completion.__slots__]


def test_kept_completions_come_back_to_the_last_bit(tmp_path: Path):
    drawn = {c.request_id: c for c in engine().generate([request("3/p/base/0"), request("ü 日")])}
    write_kept(tmp_path / "kept", drawn, version=0, replica=1, num_replicas=2)
    again = read_kept(tmp_path / "kept")
    assert {id: fields(c) for id, c in again.items()} == {id: fields(c) for id, c in drawn.items()}


def test_a_replica_that_had_finished_nothing_keeps_nothing(tmp_path: Path):
    write_kept(tmp_path, {}, version=4, replica=0, num_replicas=1)
    assert read_kept(tmp_path) == {}


def test_replicas_are_read_together_and_what_cannot_be_read_is_left_out(tmp_path: Path):
    for replica, id in enumerate(("one", "two", "three")):
        drawn = {c.request_id: c for c in engine().generate([request(id)])}
        write_kept(tmp_path, drawn, version=0, replica=replica, num_replicas=3)
    torn = tmp_path / "000000-00001-of-00003.npz"
    torn.write_bytes(torn.read_bytes()[:40])
    (tmp_path / "notes.npz").touch()
    assert set(read_kept(tmp_path)) == {"one", "three"}


def test_only_what_is_not_known_is_asked_of_the_engine():
    inner = engine()
    (known,) = inner.generate([request("a")])
    keeping = KeepingGenerator(engine=inner, known={"a": known})
    inner.seen.clear()
    found = {c.request_id: c for c in keeping.generate([request("a"), request("bb")])}
    assert found["a"] is known and set(found) == {"a", "bb"}
    assert [[r.id for r in asked] for asked in inner.seen] == [["bb"]]
    assert set(keeping.current()) == {"a", "bb"}


def test_new_weights_forget_what_old_ones_drew_and_wait_for_what_is_of_later_ones():
    inner = engine()
    inner.load_weights(iter(()), version=2)
    (later,) = inner.generate([request("later")])
    inner.load_weights(iter(()), version=1)
    keeping = KeepingGenerator(engine=inner, known={"later": later})
    assert [c.weight_version for c in keeping.generate([request("now")])] == [1]
    assert set(keeping.current()) == {"now"}
    inner.load_weights(iter(()), version=2)
    assert keeping.current() == {"later": later}


def test_what_is_in_the_journal_is_dropped(tmp_path: Path):
    for version in (3, 4, 5):
        write_kept(tmp_path, {}, version=version, replica=0, num_replicas=1)
    (tmp_path / "000002-00000-of-00001.npz.partial").touch()
    (tmp_path / "mine.npz").touch()
    drop_before(tmp_path, 5)
    assert {p.name for p in tmp_path.iterdir()} == {"000005-00000-of-00001.npz", "mine.npz"}
    drop_before(tmp_path / "not there", 5)

"""What a stopped step had finished is not drawn again, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_srpo.engines.fake import FakeGenerator
from megatron_srpo.kept import (
    KeepingGenerator,
    asked_for,
    drop_before,
    read_kept,
    write_kept,
)
from megatron_srpo.types import Completion, Request


def request(id: str, context: str = "a") -> Request:
    ids = np.array([*map(ord, context)], dtype=np.int32)
    return Request(id=id, purpose="base", context=ids, max_tokens=9, temperature=1.0, seed=len(id))


def engine() -> FakeGenerator:
    return FakeGenerator(lambda context, rng: "x" * rng.randrange(1, 8))


def drawn_by(inner: FakeGenerator, *requests: Request) -> dict[str, Completion]:
    names = {request.id: asked_for(request) for request in requests}
    return {names[c.request_id]: c for c in inner.generate(requests)}


def fields(completion: Completion) -> list[object]:
    return [np.asarray(getattr(completion, name)).tolist() for name in completion.__slots__]


def test_kept_completions_come_back_to_the_last_bit(tmp_path: Path):
    drawn = drawn_by(engine(), request("3/p#1/base/0"), request("ü 日"))
    write_kept(tmp_path / "kept", drawn, version=0, replica=1, num_replicas=2)
    again = read_kept(tmp_path / "kept")
    assert {id: fields(c) for id, c in again.items()} == {id: fields(c) for id, c in drawn.items()}


def test_a_replica_that_had_finished_nothing_keeps_nothing(tmp_path: Path):
    write_kept(tmp_path, {}, version=4, replica=0, num_replicas=1)
    assert read_kept(tmp_path) == {}


def test_replicas_are_read_together_and_what_cannot_be_read_is_left_out(tmp_path: Path):
    for replica, id in enumerate(("one", "two", "three")):
        drawn = drawn_by(engine(), request(id))
        write_kept(tmp_path, drawn, version=0, replica=replica, num_replicas=3)
    torn = tmp_path / "000000-00001-of-00003.npz"
    torn.write_bytes(torn.read_bytes()[:40])
    (tmp_path / "notes.npz").touch()
    assert {c.request_id for c in read_kept(tmp_path).values()} == {"one", "three"}


def test_only_what_is_not_known_is_asked_of_the_engine():
    inner = engine()
    known = drawn_by(inner, request("a"))
    keeping = KeepingGenerator(engine=inner, known=known)
    inner.seen.clear()
    found = {c.request_id: c for c in keeping.generate([request("a"), request("bb")])}
    assert [found["a"]] == [*known.values()] and set(found) == {"a", "bb"}
    assert [[r.id for r in asked] for asked in inner.seen] == [["bb"]]


def test_another_context_under_the_same_id_is_another_request():
    """A suffix of the same number, from where another reset has gone back to."""
    inner = engine()
    keeping = KeepingGenerator(engine=inner, known=drawn_by(inner, request("s", "before")))
    inner.seen.clear()
    assert len([*keeping.generate([request("s", "other")])]) == 1
    assert [[r.id for r in asked] for asked in inner.seen] == [["s"]]


def test_new_weights_forget_what_old_ones_drew_and_wait_for_what_is_of_later_ones():
    inner = engine()
    inner.load_weights(iter(()), version=2)
    later = drawn_by(inner, request("later"))
    inner.load_weights(iter(()), version=1)
    keeping = KeepingGenerator(engine=inner, known=later)
    assert [c.weight_version for c in keeping.generate([request("now")])] == [1]
    inner.load_weights(iter(()), version=2)
    assert keeping.to_keep(replica=0, num_replicas=1) == later


def test_what_later_weights_drew_is_no_answer_of_the_present_ones():
    inner = engine()
    inner.load_weights(iter(()), version=2)
    later = drawn_by(inner, request("a"))
    inner.load_weights(iter(()), version=1)
    keeping = KeepingGenerator(engine=inner, known=later)
    assert [c.weight_version for c in keeping.generate([request("a")])] == [1]


def test_of_what_nobody_has_asked_for_yet_each_replica_keeps_a_share():
    inner = engine()
    known = drawn_by(inner, *(request(f"{i}") for i in range(40)))
    kept: list[set[str]] = []
    for replica in range(3):
        keeping = KeepingGenerator(engine=inner, known=dict(known))
        assert len([*keeping.generate([request(f"{replica}"), request(f"new {replica}")])]) == 2
        own = keeping.to_keep(replica=replica, num_replicas=3)
        assert {f"{replica}", f"new {replica}"} <= {c.request_id for c in own.values()}
        kept.append({*own})
    assert set.union(*kept) >= {*known}
    assert all(len(one & other) < 6 for one in kept for other in kept if one is not other)


def test_what_is_in_the_journal_is_dropped(tmp_path: Path):
    for version in (3, 4, 5):
        write_kept(tmp_path, {}, version=version, replica=0, num_replicas=1)
    (tmp_path / "000002-00000-of-00001.npz.partial").touch()
    (tmp_path / "mine.npz").touch()
    drop_before(tmp_path, 5)
    assert {p.name for p in tmp_path.iterdir()} == {"000005-00000-of-00001.npz", "mine.npz"}
    drop_before(tmp_path / "not there", 5)

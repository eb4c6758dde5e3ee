"""What has a stopped step finished?   completions <-> kept/, so that no response is drawn twice

A run that is asked to stop leaves a step half generated. Its finished completions are written, and
given again to whoever asks the same weights the same thing, which is what the step does when it is
done anew. (Not where a reward or rule of the user's says something else then: a suffix of another
prefix is another request.) `kept/000012-00000-of-00002.npz` is what replica 0 of 2 drew from the
policy after 12 updates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile
from zlib import crc32

import numpy as np

from megatron_srpo.journal import flat, unflat
from megatron_srpo.staging import write_durably
from megatron_srpo.types import Completion, Request
from megatron_srpo.weight_sync import RolloutEngine

PART = re.compile(r"(\d{6,})-\d{5,}-of-\d{5,}\.npz(\.partial)?")


@dataclass(slots=True, kw_only=True)
class KeepingGenerator:
    """Implements `protocols.Generator`: an engine's completions, remembered until its weights
    change; those of an earlier process are not asked for again."""

    engine: RolloutEngine
    known: dict[str, Completion] = field(default_factory=dict)
    """`asked_for` of a request -> completion; at first those that were read from `kept/`."""
    _asked: set[str] = field(default_factory=set)
    """Of those, what this engine was asked for."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        known, names = self._current(), {r.id: asked_for(r) for r in requests}
        self._asked |= {*names.values()}
        yield from (known[name] for name in names.values() if name in known)
        rest = [request for request in requests if names[request.id] not in known]
        for completion in self.engine.generate(rest):
            self.known[names[completion.request_id]] = completion
            yield completion

    def _current(self) -> dict[str, Completion]:
        """What the engine's weights, as they are, have drawn; older ones are forgotten."""
        version = self.engine.weight_version
        self.known = {n: c for n, c in self.known.items() if c.weight_version >= version}
        self._asked &= self.known.keys()
        return {n: c for n, c in self.known.items() if c.weight_version == version}

    def to_keep(self, *, replica: int, num_replicas: int) -> dict[str, Completion]:
        """What this engine was asked for, and its share of what was read and nobody has asked for
        yet: all replicas have read the same."""
        return {
            name: completion
            for name, completion in self._current().items()
            if name in self._asked or crc32(name.encode()) % num_replicas == replica
        }


def asked_for(request: Request) -> str:
    """A name that no other request has: its id, and a digest of all that its tokens depend on."""
    said = (request.max_tokens, request.temperature, request.top_p, request.seed)
    digest = blake2b(repr(said).encode() + request.context.tobytes(), digest_size=8)
    return f"{request.id}#{digest.hexdigest()}"


def write_kept(
    folder: Path, known: Mapping[str, Completion], *, version: int, replica: int, num_replicas: int
) -> None:
    """One replica's completions of weights that have seen `version` updates."""
    completions = [*known.values()]
    arrays = BytesIO()
    np.savez(
        arrays,
        asked_for=np.array([*known], dtype=np.str_),
        token_ids=flat([c.token_ids for c in completions], np.int32),
        logprobs=flat([c.logprobs for c in completions], np.float32),
        lengths=np.array([len(c.token_ids) for c in completions], dtype=np.int64),
        finish_reason=np.array([c.finish_reason for c in completions], dtype=np.str_),
        num_cached_tokens=np.array([c.num_cached_tokens for c in completions], dtype=np.int64),
    )
    name = f"{version:06d}-{replica:05d}-of-{num_replicas:05d}.npz"
    write_durably(folder / name, arrays.getvalue())


def read_kept(folder: Path) -> dict[str, Completion]:
    """Of all replicas, however many there were. What cannot be read is drawn again."""
    known: dict[str, Completion] = {}
    for path in sorted(folder.glob("*.npz")):
        if PART.fullmatch(path.name):
            try:
                known |= _read(path)
            except (OSError, EOFError, BadZipFile, ValueError, KeyError):
                continue
    return known


def _read(path: Path) -> dict[str, Completion]:
    version = int(path.name.partition("-")[0])
    with np.load(path) as arrays:
        lengths = arrays["lengths"]
        rows = zip(
            arrays["asked_for"].tolist(),
            unflat(arrays["token_ids"], lengths),
            unflat(arrays["logprobs"], lengths),
            arrays["finish_reason"].tolist(),
            arrays["num_cached_tokens"].tolist(),
            strict=False,  # `unflat` of nothing is one empty array
        )
        return {
            name: Completion(
                request_id=name.rpartition("#")[0],
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=finish_reason,
                num_cached_tokens=num_cached_tokens,
                weight_version=version,
            )
            for name, token_ids, logprobs, finish_reason, num_cached_tokens in rows
        }


def drop_before(folder: Path, version: int) -> None:
    """Removes what was drawn from weights with fewer updates: it is in the journal."""
    for path in sorted(folder.glob("*.npz*")):
        part = PART.fullmatch(path.name)
        if part and int(part[1]) < version:
            path.unlink()

"""A model's part of a Megatron distributed checkpoint (torch_dist), a tensor at a time.

    Writer:        one process writes what many would: a file for each rank of a layout
    check_stored:  the checkpoint holds the model, no tensor less
    read_into:     some of its parameters, whole

Megatron's own `save` wants the whole model in memory, and torch's writer keeps every tensor that
it has written. The format (megatron.core.dist_checkpointing.strategies.torch over
torch.distributed.checkpoint.filesystem): files of tensors behind each other, each as `torch.save`
writes it, and `.metadata`, a pickle of where each of them is. What is written here is read by
Megatron's `load` on any layout; what is read here may be written by Megatron's `save` on any.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing import load, load_tensors_metadata
from megatron.core.dist_checkpointing.core import (
    CONFIG_FNAME,
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonLoadStrategy,
    TorchCommonSaveStrategy,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_srpo.engines.megatron.names import LAYER_PREFIX
from megatron_srpo.types import InputError

MAX_PIECE_BYTES = 2**26
"""Of what is written and read at once: who loads a tensor has it in memory, and one piece more."""
DAMAGE = (
    ArithmeticError, AttributeError, CheckpointingException, EOFError, ImportError, LookupError,
    MemoryError, OSError, RuntimeError, TypeError, ValueError, pickle.PickleError, struct.error,
)  # fmt: skip
"""What reading a damaged file ends in: a pickle is a program, which may ask for modules,
attributes and memory that there are not."""


class Writer:
    """Context manager; the checkpoint is complete when it is left without an error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = contextlib.ExitStack()
        self._streams: dict[int, IO[bytes]] = {}
        self._known: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._written: list[WriteResult] = []

    def __enter__(self) -> Writer:
        self._folder.mkdir(parents=True)
        return self

    def add(self, entry: Any, tensor: Tensor, *, dim: int | None, ranks: Sequence[int]) -> None:
        """A full parameter. `entry`: its place, from `Outline.state`; along `dim` it is divided
        over the files of `ranks`."""
        for chunk in _placed(entry, tensor):
            assert chunk.data is not None
            first = chunk.prepend_axis_num
            axis = first + (dim or 0)
            offset = list(chunk.global_offset)
            whole = chunk.data.reshape((1,) * first + chunk.local_shape)
            # What tensor parallel ranks do not divide, the first of them writes.
            parts = [whole] if dim is None else whole.tensor_split(len(ranks), axis)
            for rank, part in zip(ranks, parts, strict=False):
                start = list(offset)
                for piece in part.split(_rows_at_a_time(part, first), first):
                    self._write_tensor(chunk.key, chunk.global_shape, start, piece, rank)
                    start[first] += piece.shape[first]
                offset[axis] += part.shape[axis]

    def add_object(self, entry: ShardedObject, rank: int) -> None:
        """What Megatron stores besides tensors."""
        self._known[entry.unique_key] = BytesStorageMetadata()
        self._write([entry.data], MetadataIndex(entry.unique_key), rank)

    def _write_tensor(
        self, key: str, shape: Sequence[int], offset: Sequence[int], part: Tensor, rank: int
    ) -> None:
        stored = self._known.setdefault(
            key, TensorStorageMetadata(TensorProperties(part.dtype), torch.Size(shape), [])
        )
        assert isinstance(stored, TensorStorageMetadata)
        stored.chunks.append(ChunkStorageMetadata(torch.Size(offset), part.shape))
        # `torch.save` writes all of the memory that a view looks at.
        is_view = part.untyped_storage().nbytes() != part.nbytes or not part.is_contiguous()
        alone = part.clone(memory_format=torch.contiguous_format) if is_view else part
        self._write(alone, MetadataIndex(key, offset), rank)

    def _write(self, content: object, index: MetadataIndex, rank: int) -> None:
        file = f"__{rank}_0.distcp"
        if rank not in self._streams:
            opened = (self._folder / file).open("wb")
            self._streams[rank] = self._files.enter_context(opened)
        stream = self._streams[rank]
        start = stream.tell()
        torch.save(content, stream)
        length = stream.tell() - start
        self._written.append(WriteResult(index, length, _StorageInfo(file, start, length)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()
        if error is not None:
            return
        FileSystemWriter(self._folder).finish(Metadata(self._known), [self._written])
        TorchCommonSaveStrategy("torch", 1).save_common({}, self._folder)
        save_config(CheckpointingConfig("torch_dist"), str(self._folder))


def _rows_at_a_time(tensor: Tensor, axis: int) -> int:
    rows = tensor.shape[axis]
    return max(1, rows * MAX_PIECE_BYTES // max(1, tensor.nbytes))


def _placed(entry: Any, tensor: Tensor) -> list[ShardedTensor]:
    """The entry filled: Megatron stores some parameters, gate and up, as several tensors."""
    if isinstance(entry, ShardedTensorFactory):
        return list(_tensors(replace(entry, data=tensor).build()))
    return [replace(entry, data=tensor, dtype=tensor.dtype)]


def _tensors(built: Any) -> Iterator[ShardedTensor]:
    if isinstance(built, ShardedTensor):
        yield built
    else:
        for part in built.values() if isinstance(built, Mapping) else built:
            yield from _tensors(part)


def stored_tensors(folder: Path) -> Mapping[str, Any]:
    """Key -> a ShardedTensor without data. Raises `InputError` for a file besides those of the
    tensors that Megatron could not read."""
    with _named(folder / CONFIG_FNAME) as path:
        CheckpointingConfig(**json.loads(path.read_text("utf-8")))
    with _named(folder / COMMON_STATE_FNAME):
        dict(TorchCommonLoadStrategy().load_common(folder))
    with _named(folder / ".metadata"):
        return load_tensors_metadata(str(folder))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[Path]:
    try:
        yield path
    except DAMAGE as error:
        raise InputError(
            f"{path}: not readable as part of a distributed checkpoint "
            f"({type(error).__name__}: {_line(error)})"
        ) from error


def has_numbered_layers(stored: Mapping[str, Any]) -> bool:
    """Whether each layer's tensors are stored under its number, or those of all layers as one."""
    return any(key.startswith(f"{LAYER_PREFIX}0.") for key in stored)


def check_stored(
    folder: Path,
    stored: Mapping[str, Any],
    state: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises `InputError` if the checkpoint lacks a tensor of the model, or has it in another
    shape; what else it has is not the model's."""
    for name, shape in shapes.items():
        for chunk in _placed(state[name], torch.empty(shape, device="meta")):
            if chunk.key not in stored:
                raise InputError(f"{folder}: lacks {chunk.key}")
            if (found := stored[chunk.key].global_shape) != chunk.global_shape:
                raise InputError(
                    f"{folder}: {chunk.key} has a shape that does not fit config.json "
                    f"({found} instead of {chunk.global_shape})"
                )


def read_into(tensors: Mapping[str, Tensor], folder: Path, state: Mapping[str, Any]) -> None:
    """Fill full parameters, by name, from what is stored, cast to each one's dtype."""
    wanted: dict[str, ShardedTensor] = {}
    for name, tensor in tensors.items():
        for number, chunk in enumerate(_placed(state[name], tensor)):
            assert chunk.data is not None
            assert chunk.data.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            wanted[f"{name}.{number}"] = _among_others(chunk)
    try:
        load(wanted, str(folder), validate_access_integrity=False)
    except CheckpointException as error:  # torch's, around what happened on each rank
        cause, _ = error.failures[0]
        raise InputError(f"{folder}: {min(tensors)} cannot be read ({_line(cause)})") from error


def _among_others(chunk: ShardedTensor) -> ShardedTensor:
    """A part of a tensor of which nothing else is wanted.

    Megatron loads either all layers of a stack or none in one process, but any part of any other
    tensor: the layer becomes an axis like others. Embedding and head, whose rows may be padded, it
    fills with zeros where the checkpoint has none: not here, where `check_stored` has compared."""
    assert chunk.data is not None
    shape = (1,) * chunk.prepend_axis_num + chunk.local_shape
    return replace(
        chunk,
        data=chunk.data.view(shape),
        local_shape=shape,
        prepend_axis_num=0,
        allow_shape_mismatch=False,
    )


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def objects(state: Mapping[str, Any]) -> Iterable[ShardedObject]:
    """What is no tensor in it."""
    return (entry for entry in state.values() if isinstance(entry, ShardedObject))

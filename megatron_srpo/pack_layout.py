"""What must packing obey?   sizes of the parallel layout -> multiples, counts and limits

Pure. Every rule that a layout of ranks makes about lengths and numbers is here and nowhere else:

- context parallel: a rank computes chunks r and 2 CP - 1 - r of *each* sequence, which so divides
  into 2 CP equal chunks (megatron-core 0.16.1, core/utils.py, get_thd_batch_on_this_cp_rank)
- sequence parallel, always on with TP > 1: a rank's T / CP tokens are split into TP equal parts
- FP8: what a rank multiplies has a number of tokens that divides by 16, also where sequence
  parallelism splits it: Transformer Engine casts before it gathers (by 32 with MXFP8:
  core/fp8_utils.py, get_fp8_align_size)
- interleaved pipeline: micro-batches go through a stage's chunks in groups of PP; a last group of
  fewer is refused (core/pipeline_parallel/schedules.py,
  forward_backward_pipelining_with_interleaving), so only multiples of PP are legal
- data parallel: equally many micro-batches in every slot, because ranks meet in collectives
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import lcm
from typing import Protocol, Self

from megatron_srpo.config_sections import ParallelConfig


class Sizes(Protocol):
    """What packing asks of a mesh."""

    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def dp_size(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLayout:
    """Counts and tokens, all at least 1; ValueError for others."""

    num_slots: int
    """Copies of the policy: data parallel, what context parallelism shares not counted."""
    max_tokens: int
    """Of a micro-batch, padding included; one sequence may be longer."""
    sequence_multiple: int
    """Divides the length of every padded sequence."""
    total_multiple: int
    """Divides the length of every micro-batch; itself a multiple of `sequence_multiple`."""
    count_multiple: int
    """Divides every slot's number of micro-batches."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: must be at least 1")
        if self.total_multiple % self.sequence_multiple:
            raise ValueError(
                f"total_multiple={self.total_multiple}: must be a multiple of "
                f"sequence_multiple={self.sequence_multiple}"
            )

    @classmethod
    def of(
        cls,
        *,
        num_slots: int,
        max_tokens: int,
        tp: int = 1,
        cp: int = 1,
        pp: int = 1,
        vpp: int = 1,
        fp8_multiple: int = 1,
    ) -> Self:
        """From the sizes of a layout. `vpp`: chunks of the model per pipeline stage.
        `fp8_multiple`: 16 for FP8, 32 for MXFP8.

        >>> PackLayout.of(num_slots=4, max_tokens=1000, tp=4, cp=3, pp=2, vpp=2).total_multiple
        12
        """
        sequence_multiple = 2 * cp if cp > 1 else 1
        return cls(
            num_slots=num_slots,
            max_tokens=max_tokens,
            sequence_multiple=sequence_multiple,
            total_multiple=lcm(sequence_multiple, fp8_multiple * tp * cp),
            count_multiple=pp if vpp > 1 else 1,
        )

    @classmethod
    def on(cls, mesh: Sizes, *, max_tokens: int, fp8_multiple: int = 1) -> Self:
        """From a mesh: the one place that knows which of its sizes concern packing."""
        sizes = mesh.parallel
        return cls.of(
            num_slots=mesh.dp_size,
            max_tokens=max_tokens,
            tp=sizes.tp,
            cp=sizes.cp,
            pp=sizes.pp,
            vpp=sizes.vpp,
            fp8_multiple=fp8_multiple,
        )

    @property
    def capacity(self) -> int:
        """Tokens that a micro-batch can hold: `max_tokens` rounded down to what divides. The
        shortest micro-batch there is has `total_multiple` tokens, whatever `max_tokens` says."""
        return max(self.max_tokens // self.total_multiple, 1) * self.total_multiple

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple

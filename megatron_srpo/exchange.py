"""Who learns from which sample?   samples of all replicas -> this rank's batch

Lengths are gathered, every rank computes the same plan over the copies of the policy, and each
sample travels once to each rank that holds a part of the copy which the plan names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_srpo.batching import pack, plan_micro_batches
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.types import Batch, Sample


def exchange(
    samples: Sequence[Sample], mesh: Mesh, *, layout: PackLayout, with_silent: bool = False
) -> Batch:
    """Collective. A replica's ranks hold the same samples: its leader's are the ones that count.

    Samples without a gradient stay behind and count in the denominator. `with_silent`: only those
    without a weight do; a loss with a KL term learns also where the advantage is 0.
    """
    own = samples if mesh.is_leader else ()
    trained = [s for s in own if s.is_trained or (with_silent and np.any(s.loss_weight))]
    shares = mesh.gather(
        (
            [len(sample.token_ids) - 1 for sample in trained],
            sum(sample.count for sample in own),
            sum(sample.is_auxiliary for sample in own),
        )
    )
    lengths = [length for share, _, _ in shares for length in share]
    # Where nothing but auxiliary samples is left, they are divided by nothing but their number.
    denominator = sum(count for _, count, _ in shares) or 1.0
    num_auxiliary = sum(number for _, _, number in shares)
    if not lengths:
        return Batch(micro_batches=(), denominator=denominator)
    plan = plan_micro_batches(lengths, layout)

    first = sum(len(share) for share, _, _ in shares[: mesh.rank])
    mine = {
        first + offset: _times(sample, denominator / num_auxiliary)
        if sample.is_auxiliary
        else sample
        for offset, sample in enumerate(trained)
    }
    outgoing = [
        {index: mine[index] for bin in plan[slot] for index in bin if index in mine}
        for slot in mesh.slots
    ]
    here: dict[int, Sample] = {}
    for arrived in mesh.exchange(outgoing):
        here |= arrived
    return Batch(
        micro_batches=tuple(
            pack([here[index] for index in bin], layout) for bin in plan[mesh.dp_rank]
        ),
        denominator=denominator,
    )


def _times(sample: Sample, factor: float) -> Sample:
    return replace(sample, loss_weight=sample.loss_weight * np.float32(factor))

"""Who learns from which sample?   samples of all ranks -> this rank's batch

Lengths are gathered, every rank computes the same plan, and each sample travels once, to the rank
that the plan names.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_srpo.batching import pack, plan_micro_batches
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.types import Batch, Sample


def exchange(samples: Sequence[Sample], mesh: Mesh, *, max_tokens: int) -> Batch:
    """Collective. Samples without a gradient stay behind; they count in the denominator."""
    trained = [sample for sample in samples if sample.is_trained]
    shares = mesh.gather(([len(sample.token_ids) - 1 for sample in trained], _count(samples)))
    denominator = sum(count for _, count in shares)
    lengths = [length for own, _ in shares for length in own]
    if not lengths or not denominator:
        return Batch(micro_batches=(), denominator=denominator)
    plan = plan_micro_batches(lengths, num_ranks=mesh.world_size, max_tokens=max_tokens)

    first = sum(len(own) for own, _ in shares[: mesh.rank])
    mine = {first + offset: sample for offset, sample in enumerate(trained)}
    outgoing = [
        {index: mine[index] for bin in micro_batches for index in bin if index in mine}
        for micro_batches in plan
    ]
    here: dict[int, Sample] = {}
    for arrived in mesh.exchange(outgoing):
        here |= arrived
    return Batch(
        micro_batches=tuple(pack([here[index] for index in bin]) for bin in plan[mesh.rank]),
        denominator=denominator,
    )


def _count(samples: Sequence[Sample]) -> float:
    return sum(sample.count for sample in samples)

"""How does a GPTModel end before its logits?   with a head that has a weight and does not use it

Whoever wants logits, or only log-probs, multiplies with the weight (`forward.py`).
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class Unprojected(ColumnParallelLinear):
    """Takes a head's place with its parameter (none, if that is the embedding's).

    It is called as a head is, so that DistributedDataParallel gathers the weight in time, and it
    does for the hidden states what the head did before it multiplied: under sequence parallelism
    they are gathered, and their gradients summed and scattered.
    """

    def __init__(self, head: Any) -> None:
        super().__init__(
            head.input_size,
            head.output_size,
            config=head.config,
            init_method=head.config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=head.tp_group,
        )
        self.weight = head.weight

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """[T / CP / TP, 1, H] -> [T / CP, 1, H]"""
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        return input_, None

"""The policy in training: `protocols.Learner` on Megatron-Core.

How a token's loss becomes a gradient, derived once, here:

    L = sum over all ranks r, micro-batches m, tokens t of  w_t l_t / D

1. `loss.policy_loss` sums w_t l_t over the tokens of one micro-batch and divides by D, the *global*
   denominator (`Batch.denominator`, the same number on every rank).
2. Megatron's schedule backpropagates each micro-batch's loss as it stands: with
   `calculate_per_token_loss` it divides neither by the number of micro-batches nor by a token
   count (0.16.1 pipeline_parallel/schedules.py, forward_step_calc_loss).
3. DistributedDataParallel adds micro-batches up in its buffer and, for the same flag, *sums* over
   ranks with a scaling factor of 1 (distributed/distributed_data_parallel.py).
4. `finalize_model_grads` would divide by the token count that the schedule hands it; D has already
   been divided by, so the count is withheld (`_finalize_without_count`).

Hence the gradient that the optimizer sees is that of L, whatever the packing and the number of
ranks; tests/parallel proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_srpo.batching import pack
from megatron_srpo.config import LossConfig, OptimizerConfig
from megatron_srpo.data import demonstration_sample
from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.logprobs import token_entropies, token_logprobs
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_model
from megatron_srpo.engines.megatron.optimizer import MegatronAdam
from megatron_srpo.engines.megatron.reference import ParkedWeights
from megatron_srpo.engines.megatron.weights import all_shards, full_tensors, local_parameters
from megatron_srpo.loss import (
    Counters,
    TokenTensors,
    add_counters,
    on_host,
    over_sampled,
    policy_loss,
    to_metrics,
)
from megatron_srpo.types import AlarmError, Batch, Floats, MicroBatch, Tokens

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """A micro-batch on its way to a gradient."""

    micro_batch: MicroBatch
    old_T: Tensor | None
    """[T] log-probs of its targets before the first update; None: this is the first."""
    reference_T: Tensor | None
    """[T] log-probs of its targets under the initial weights; None: no KL term."""


class MegatronLearner:
    """GPTModel, DistributedDataParallel and the distributed optimizer on one mesh."""

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        temperature: float,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        num_steps: int,
    ) -> None:
        """`temperature` is the rollouts'; `num_steps` is what the learning rate decays over."""
        self._mesh, self._temperature, self._cfg = mesh, temperature, loss
        self._family = family_of(folder)
        self.module = build_model(folder, mesh, dtype)
        self.shards = all_shards(self.module, mesh)
        self._device = next(self.module.parameters()).device
        self.model = DistributedDataParallel(
            self.module.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            self.module,
        )
        self.optimizer = MegatronAdam(self.model, optimizer, dtype=dtype, num_steps=num_steps)
        self._reference = ParkedWeights(self.module) if loss.kl_coef else None
        self.module.config.finalize_model_grads_func = _finalize_without_count
        self.module.config.grad_scale_func = self.optimizer.scale_loss

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step per batch, all at one learning rate; returns metrics of all of them.

        A batch without micro-batches has no gradient and no step. Token metrics speak of all
        batches together, `loss` and `loss/demonstrations` are means over the steps, `grad_norm` is
        the largest.
        """
        lr = self.optimizer.advance()
        batches = [batch for batch in batches if batch.micro_batches]
        if not batches:
            return {"loss": 0.0, "grad_norm": 0.0, "tokens/trained": 0.0, "optimizer/lr": lr}
        passes = self._passes(batches)
        counters: list[Counters] = []
        grad_norms: list[float] = []
        for batch, items in zip(batches, passes, strict=True):
            counters.append(self._backward(items, batch.denominator))
            grad_norms.append(self.optimizer.step())
            if not np.isfinite(grad_norms[-1]):
                raise AlarmError(f"gradient norm is {grad_norms[-1]}")
        metrics = to_metrics(add_counters(counters))
        for name in ("loss", "loss/demonstrations"):
            metrics[name] /= len(batches)
        return {**metrics, "grad_norm": max(grad_norms), "optimizer/lr": lr}

    def backward(self, batch: Batch) -> dict[str, float]:
        """Gradients of a step's first batch, reduced over ranks, in the buffers; its metrics."""
        (items,) = self._passes([batch])
        return to_metrics(self._backward(items, batch.denominator))

    def _passes(self, batches: Sequence[Batch]) -> list[list[Pass]]:
        """Micro-batches, with what other weights than those in training say of their targets.

        The first batch meets the old policy itself, so only later ones need its log-probs.
        """
        unknown = [[None] * len(batch.micro_batches) for batch in batches]
        references = unknown
        if self._reference:
            with self._reference.in_place():
                references = [self._target_logprobs(batch.micro_batches) for batch in batches]
        olds = [unknown[0], *(self._target_logprobs(batch.micro_batches) for batch in batches[1:])]
        return [
            [
                Pass(micro_batch=micro_batch, old_T=old_T, reference_T=reference_T)
                for micro_batch, old_T, reference_T in zip(
                    batch.micro_batches, old, reference, strict=True
                )
            ]
            for batch, old, reference in zip(batches, olds, references, strict=True)
        ]

    def _backward(self, items: Sequence[Pass], denominator: float) -> Counters:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        per_micro_batch = self._schedule(
            [item.micro_batch for item in items],
            lambda index, logits_TV: self._loss(logits_TV, items[index], denominator),
            forward_only=False,
        )
        if not self._mesh.speaks_for_slot:
            per_micro_batch = []  # the other ranks of this copy know the same, or nothing
        self._refuse_non_finite(per_micro_batch, items)
        return self._reduce(per_micro_batch)

    def _schedule(
        self,
        micro_batches: Sequence[MicroBatch],
        finish: Callable[[int, Tensor], tuple[Tensor, R]],
        *,
        forward_only: bool,
    ) -> list[R]:
        """Megatron's schedule. `finish` makes of a micro-batch's index and logits its loss and a
        result; results come in the order of the micro-batches, from the last stage only."""

        def forward_step(indices: Iterator[int], model: torch.nn.Module) -> tuple[Tensor, Any]:
            index = next(indices)

            def loss_func(output: Tensor) -> tuple[Tensor, Tensor, R]:
                loss, result = finish(index, output[0])
                return loss, torch.zeros((), dtype=torch.int), result

            return self.logits(model, micro_batches[index]), loss_func

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(len(micro_batches))),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=max(len(m.token_ids) for m in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    @torch.no_grad()
    def _target_logprobs(
        self, micro_batches: Sequence[MicroBatch], *, temperature: float | None = None
    ) -> list[Tensor]:
        """[T] each, under the weights that are in the model now; None: as in training. Only the
        last stage knows them: on the others it is room to receive them into."""
        at = self._temperature if temperature is None else temperature

        def finish(index: int, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
            targets_T = self._tensor(micro_batches[index].target_ids).long()
            found_T = token_logprobs(logits_TV, targets_T, temperature=at)
            return found_T.sum(), found_T  # the schedule wants a loss; nothing descends it

        found = self._schedule(micro_batches, finish, forward_only=True)
        return found or [torch.empty(len(m.token_ids), device=self._device) for m in micro_batches]

    def _refuse_non_finite(self, stats: Sequence[Counters], items: Sequence[Pass]) -> None:
        """Raises on every rank if the loss of any rank's micro-batch is not finite."""
        bad = [
            ", ".join(item.micro_batch.sample_ids)
            for item, each in zip(items, stats, strict=bool(stats))
            if not torch.isfinite(each.quotients["loss"][0])
        ]
        everywhere = [samples for share in self._mesh.gather(bad) for samples in share]
        if everywhere:
            raise AlarmError(f"the loss is not finite in samples {', '.join(everywhere)}")

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self._device)

    def logits(self, model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
        """[1, T, V]"""
        cu_seqlens = self._tensor(micro_batch.cu_seqlens)
        longest = int(np.diff(micro_batch.cu_seqlens).max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return model(
            self._tensor(micro_batch.token_ids).long()[None],
            self._tensor(micro_batch.position_ids).long()[None],
            None,
            packed_seq_params=packed,
        )

    def _loss(self, logits_TV: Tensor, item: Pass, denominator: float) -> tuple[Tensor, Counters]:
        micro_batch = item.micro_batch
        targets_T = self._tensor(micro_batch.target_ids).long()
        logprobs_T = token_logprobs(logits_TV, targets_T, temperature=self._temperature)
        tokens = TokenTensors(
            loss_weight_T=self._tensor(micro_batch.loss_weight),
            advantage_T=self._tensor(micro_batch.advantage),
            rollout_T=self._tensor(micro_batch.logprob),
            old_T=item.old_T,
            reference_T=item.reference_T,
            cu_seqlens=self._tensor(micro_batch.cu_seqlens),
        )
        loss, counters = policy_loss(logprobs_T, tokens, self._cfg, denominator=denominator)
        entropies_T = token_entropies(
            logits_TV.detach(), temperature=self._temperature, group=self._mesh.tp_group
        )
        entropy = {"entropy": over_sampled(entropies_T, tokens)}
        return loss, replace(counters, quotients=counters.quotients | entropy)

    def _reduce(self, per_micro_batch: Sequence[Counters]) -> Counters:
        """Sums and maxima over the copies of the policy, equal on all ranks."""
        own = [on_host(add_counters(per_micro_batch))] if per_micro_batch else []
        return add_counters([each for share in self._mesh.gather(own) for each in share])

    def logprobs(self, sequences: Sequence[Tokens], *, temperature: float) -> list[Floats]:
        """Each [T - 1]: log-prob of every token after the first, on all ranks of the copy."""
        if not sequences:
            return []
        micro_batches = [
            pack([demonstration_sample("", tokens[:1], tokens[1:], weight=0.0, count=0.0)])
            for tokens in sequences
        ]
        found = self._target_logprobs(micro_batches, temperature=temperature)
        if self._mesh.pp_size > 1:
            for logprobs_T in found:
                last = self._mesh.pp_size - 1
                dist.broadcast(logprobs_T, group=self._mesh.pp_group, group_src=last)
        return [logprobs_T.cpu().numpy() for logprobs_T in found]

    def export(self) -> Iterator[tuple[str, Tensor]]:
        parameters = local_parameters(self.module)
        return full_tensors(self.module, self._family, self._mesh, self.shards, parameters)


def _finalize_without_count(
    model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
) -> None:
    """Step 4 of the module's derivation."""
    finalize_model_grads(model, None, **kwargs)

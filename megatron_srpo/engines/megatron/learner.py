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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from megatron_srpo.config_sections import KernelConfig, LossConfig, OptimizerConfig
from megatron_srpo.engines.megatron.backend import LOCAL, Backend
from megatron_srpo.engines.megatron.families import family_of
from megatron_srpo.engines.megatron.forward import Forward, one_or_all
from megatron_srpo.engines.megatron.fp8 import gather_fields
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_chunks
from megatron_srpo.engines.megatron.names import heads_of
from megatron_srpo.engines.megatron.optimizer import MegatronAdam
from megatron_srpo.engines.megatron.parking import Parking, bytes_of
from megatron_srpo.engines.megatron.reference import ParkedWeights
from megatron_srpo.engines.megatron.weights import (
    all_shards,
    full_tensors,
    load_hf,
    local_parameters,
)
from megatron_srpo.kernels.policy_loss import policy_loss
from megatron_srpo.loss import (
    Counters,
    TokenTensors,
    add_counters,
    on_host,
    over_sampled,
    to_metrics,
)
from megatron_srpo.loss import policy_loss as reference_loss
from megatron_srpo.protocols import LearnerPart
from megatron_srpo.stopping import StopPoints
from megatron_srpo.types import AlarmError, Batch, Floats, MicroBatch, Tokens

LOSSES = {"fused": policy_loss, "reference": reference_loss}


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
        kernels: KernelConfig = KernelConfig(),
        backend: Backend = LOCAL,
        points: StopPoints | None = None,
    ) -> None:
        """`temperature` is the rollouts'; `num_steps` is what the learning rate decays over. An
        update can be stopped at `points`, until it has changed weights."""
        self._mesh, self._temperature, self._cfg = mesh, temperature, loss
        self._policy_loss = LOSSES[kernels.head]
        self._points = points or StopPoints()
        self._family, self._heads = family_of(folder), heads_of(folder)
        self.modules = build_chunks(folder, mesh, dtype, backend)
        load_hf(self.modules, folder, mesh)
        self.shards = all_shards(self.modules, mesh)
        self.models = [
            DistributedDataParallel(
                module.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=mesh.parallel.overlap,
                    overlap_param_gather=mesh.parallel.overlap,
                    **gather_fields(backend.fp8),
                ),
                module,
                disable_bucketing=index > 0,
            )
            for index, module in enumerate(self.modules)
        ]
        self.optimizer = MegatronAdam(
            self.models, optimizer, fp8=backend.fp8, dtype=dtype, num_steps=num_steps
        )
        self._reference = ParkedWeights(self.modules) if loss.kl_coef else None
        self._forward = Forward(self.models, mesh, self._heads, kernels, self._points)
        self._tell_schedule(mesh.parallel.overlap)
        self._device = next(self.modules[0].parameters()).device
        self._parking = {part: Parking(device=self._device) for part in ("optimizer", "weights")}

    def _tell_schedule(self, overlap: bool) -> None:
        """Megatron's schedules find what they call in the model's config."""
        config: Any = self.modules[0].config  # of all chunks
        config.finalize_model_grads_func = self._finalize_without_count
        config.grad_scale_func = self.optimizer.scale_loss
        if overlap:
            config.no_sync_func = one_or_all([model.no_sync for model in self.models])
            config.grad_sync_func = one_or_all([model.start_grad_sync for model in self.models])

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step per batch, all at one learning rate; returns metrics of all of them.

        Raises `StopRequested`, with nothing changed, if the run is to stop before the first step.
        A batch without micro-batches has no gradient and no step. Token metrics speak of all
        batches together, `loss` and `loss/demonstrations` are means over the steps, `grad_norm` is
        the largest.
        """
        batches = [batch for batch in batches if batch.micro_batches]
        if not batches:
            lr = self.optimizer.advance()
            return {"loss": 0.0, "grad_norm": 0.0, "tokens/trained": 0.0, "optimizer/lr": lr}
        with self._points.section(is_joint=True):
            passes = self._passes(batches)
            counters = [self._backward(passes[0], batches[0].denominator)]
        lr = self.optimizer.advance()
        grad_norms = [self._step()]
        for batch, items in zip(batches[1:], passes[1:], strict=True):
            counters.append(self._backward(items, batch.denominator))
            grad_norms.append(self._step())
        if self._mesh.parallel.overlap:
            for model in self.models:  # whoever reads the weights next may not come by a hook
                model.start_param_sync(force_sync=True)
        metrics = to_metrics(add_counters(counters))
        for name in ("loss", "loss/demonstrations"):
            metrics[name] /= len(batches)
        return {**metrics, "grad_norm": max(grad_norms), "optimizer/lr": lr}

    def _step(self) -> float:
        grad_norm = self.optimizer.step()
        if not np.isfinite(grad_norm):
            raise AlarmError(f"gradient norm is {grad_norm}")
        return grad_norm

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
                references = [self._logprobs_of(batch) for batch in batches]
        olds = [unknown[0], *(self._logprobs_of(batch) for batch in batches[1:])]
        return [
            [
                Pass(micro_batch=micro_batch, old_T=old_T, reference_T=reference_T)
                for micro_batch, old_T, reference_T in zip(
                    batch.micro_batches, old, reference, strict=True
                )
            ]
            for batch, old, reference in zip(batches, olds, references, strict=True)
        ]

    def _logprobs_of(self, batch: Batch) -> list[Tensor]:
        return self._forward.target_logprobs(batch.micro_batches, temperature=self._temperature)

    def _backward(self, items: Sequence[Pass], denominator: float) -> Counters:
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        per_micro_batch = self._forward.run(
            [item.micro_batch for item in items],
            lambda index, hidden_TH: self._loss(hidden_TH, items[index], denominator),
            forward_only=False,
        )
        if not self._mesh.speaks_for_slot:
            per_micro_batch = []  # the other ranks of this copy know the same, or nothing
        self._refuse_non_finite(per_micro_batch, items)
        return self._reduce(per_micro_batch)

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

    def _loss(self, hidden_TH: Tensor, item: Pass, denominator: float) -> tuple[Tensor, Counters]:
        micro_batch = item.micro_batch
        logprobs_T, entropies_T = self._forward.logprobs(
            hidden_TH, micro_batch, temperature=self._temperature
        )
        tokens = TokenTensors(
            loss_weight_T=self._forward.tensor(micro_batch.loss_weight),
            advantage_T=self._forward.tensor(micro_batch.advantage),
            rollout_T=self._forward.tensor(micro_batch.logprob),
            old_T=item.old_T,
            reference_T=item.reference_T,
            cu_seqlens=self._forward.tensor(micro_batch.cu_seqlens),
        )
        loss, counters = self._policy_loss(logprobs_T, tokens, self._cfg, denominator=denominator)
        entropy = {"entropy": over_sampled(entropies_T, tokens)}
        return loss, replace(counters, quotients=counters.quotients | entropy)

    def _reduce(self, per_micro_batch: Sequence[Counters]) -> Counters:
        """Sums and maxima over the copies of the policy, equal on all ranks."""
        own = [on_host(add_counters(per_micro_batch))] if per_micro_batch else []
        return add_counters([each for share in self._mesh.gather(own) for each in share])

    def logprobs(self, sequences: Sequence[Tokens], *, temperature: float) -> list[Floats]:
        """Each [T - 1]: log-prob of every token after the first, on all ranks of the copy."""
        return self._forward.sequence_logprobs(sequences, temperature=temperature)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        return self.gathered(local_parameters(self.modules, self._mesh))

    def gathered(self, local: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Collective: of what each rank has by parameter name (weights, or gradients in their
        shapes), full tensors by Hugging Face name."""
        return full_tensors(
            self._family,
            self._heads,
            self._mesh,
            self.shards,
            local,
            tied=self.modules[0].share_embeddings_and_output_weights,
        )

    def park(self, part: LearnerPart) -> None:
        """Implements `Parkable`. Weights are also Adam's own where they are float32: its updates
        are views of them, and stay so."""
        if part == "gradients":
            for model in self.models:
                model.offload_grad_buffers()
        else:
            self._parking[part].park(self._tensors(part))
            torch.cuda.empty_cache()  # it is the driver that gives it to the rollout engine

    def unpark(self, part: LearnerPart) -> None:
        if part == "gradients":
            for model in self.models:
                model.restore_grad_buffers()
        else:
            self._parking[part].unpark()

    def held(self) -> dict[str, int]:
        parts: tuple[LearnerPart, ...] = ("weights", "gradients", "optimizer")
        return {part: bytes_of(self._tensors(part), self._device) for part in parts}

    def _tensors(self, part: LearnerPart) -> Iterable[Tensor]:
        """All that the part has on its device: its storages are nobody else's."""
        models: list[Any] = self.models  # whose `buffers` are not torch's
        buffers = [b for model in models for b in model.buffers + model.expert_parallel_buffers]
        if part == "gradients":
            return [buffer.grad_data for buffer in buffers]
        weights = [buffer.param_data for buffer in buffers]
        if part == "weights":
            return weights
        of_weights = {tensor.untyped_storage()._cdata for tensor in weights}
        tensors = self.optimizer.tensors()
        return [t for t in tensors if t.untyped_storage()._cdata not in of_weights]

    def _finalize_without_count(
        self, model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Step 4 of the module's derivation."""
        if not self._forward.is_stopping:  # else there are no whole gradients
            finalize_model_grads(model, None, **kwargs)

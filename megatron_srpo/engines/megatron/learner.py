"""The policy in training: `protocols.Learner` on Megatron-Core.

How a token's loss becomes a gradient, derived once, here:

    L = - sum over all ranks r, micro-batches m, tokens t of  w_t A_t log pi(t) / D

1. `loss.policy_loss` sums over the tokens of one micro-batch and divides by D, the *global*
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
from pathlib import Path
from typing import Any

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
from megatron_srpo.config import OptimizerConfig
from megatron_srpo.data import demonstration_sample
from megatron_srpo.engines.megatron.logprobs import token_entropies, token_logprobs
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import build_model, family_of
from megatron_srpo.engines.megatron.optimizer import MegatronAdam
from megatron_srpo.engines.megatron.weights import full_tensors, local_parameters
from megatron_srpo.loss import mismatch, policy_loss
from megatron_srpo.types import AlarmError, Batch, Floats, MicroBatch, Tokens


SUMS = ("loss", "demonstrations", "num_tokens", "entropy", "abs_sum", "k3_sum")
"""Of a micro-batch, added up over all of them."""


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
        num_steps: int,
    ) -> None:
        """`temperature` is the rollouts'; `num_steps` is what the learning rate decays over."""
        self._mesh, self._temperature = mesh, temperature
        self._family = family_of(folder)
        self.module = build_model(folder, mesh, dtype)
        self._device = next(self.module.parameters()).device
        self.model = DistributedDataParallel(
            self.module.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            self.module,
        )
        self._optimizer = MegatronAdam(self.model, optimizer, dtype=dtype, num_steps=num_steps)
        self.module.config.finalize_model_grads_func = _finalize_without_count
        self.module.config.grad_scale_func = self._optimizer.scale_loss

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        (batch,) = batches
        return self._update(batch)

    def _update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step. A batch without micro-batches has no gradient: nothing moves."""
        if not batch.micro_batches:
            self._optimizer.skip_step()
            return {"loss": 0.0, "grad_norm": 0.0, "tokens/trained": 0.0}
        stats = self.backward(batch)
        grad_norm = self._optimizer.step()
        if not np.isfinite(grad_norm):
            raise AlarmError(f"gradient norm is {grad_norm}")
        return {**stats, "grad_norm": grad_norm}

    def backward(self, batch: Batch) -> dict[str, float]:
        """Gradients of the batch, reduced over ranks, into the buffers; metrics of the batch."""
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()

        def forward_step(
            micro_batches: Iterator[MicroBatch], model: torch.nn.Module
        ) -> tuple[Tensor, Any]:
            micro_batch = next(micro_batches)
            logits_TV = self.logits(model, micro_batch)

            def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                return self._loss(output[0], micro_batch, batch.denominator)

            return logits_TV, loss_func

        per_micro_batch = self._run(forward_step, batch.micro_batches, self.model)
        if not self._mesh.speaks_for_slot:
            per_micro_batch = []  # the others of this copy would say the same
        self._refuse_non_finite(per_micro_batch, batch)
        return self._reduce(per_micro_batch)

    def _run(
        self,
        forward_step: Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, Any]],
        micro_batches: Sequence[MicroBatch],
        model: torch.nn.Module,
        forward_only: bool = False,
    ) -> list[Any]:
        """Megatron's schedule; what the loss function said of each micro-batch, on the last stage."""
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=model,
            num_microbatches=len(micro_batches),
            seq_length=max(len(m.token_ids) for m in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _refuse_non_finite(self, stats: Sequence[dict[str, Tensor]], batch: Batch) -> None:
        """Raises on every rank if the loss of any rank's micro-batch is not finite."""
        bad = [
            ", ".join(micro_batch.sample_ids)
            for micro_batch, each in zip(batch.micro_batches, stats, strict=False)
            if not torch.isfinite(each["loss"])
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

    def _loss(
        self, logits_TV: Tensor, micro_batch: MicroBatch, denominator: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        targets_T = self._tensor(micro_batch.target_ids).long()
        weight_T = self._tensor(micro_batch.loss_weight)
        logprobs_T = token_logprobs(logits_TV, targets_T, temperature=self._temperature)
        advantage_T = self._tensor(micro_batch.advantage)
        loss = policy_loss(logprobs_T, weight_T, advantage_T, denominator=denominator)
        entropies_T = token_entropies(
            logits_TV.detach(), temperature=self._temperature, group=self._mesh.tp_group
        )
        rollout_T = self._tensor(micro_batch.logprob)
        shown_T = torch.isnan(rollout_T)
        sampled_T = (weight_T != 0) & ~shown_T
        off = mismatch(logprobs_T[sampled_T], rollout_T[sampled_T])
        demonstrations = policy_loss(
            logprobs_T.detach()[shown_T],
            weight_T[shown_T],
            advantage_T[shown_T],
            denominator=denominator,
        )
        stats = {
            "loss": loss.detach().double(),
            "demonstrations": demonstrations.double(),
            "num_tokens": sampled_T.sum().double(),
            "entropy": entropies_T[sampled_T].double().sum(),
            "abs_sum": off.abs_sum,
            "k3_sum": off.k3_sum,
            "abs_max": off.abs_max,
        }
        return loss, torch.zeros((), dtype=torch.int), stats

    def _reduce(self, per_micro_batch: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Metrics of the whole batch, equal on all ranks."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        sums = torch.stack([sum((s[name] for s in per_micro_batch), zero) for name in SUMS])
        largest = torch.stack([zero, *(s["abs_max"] for s in per_micro_batch)]).max()
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        num_tokens = max(total["num_tokens"], 1.0)
        return {
            "loss": total["loss"],
            "loss/demonstrations": total["demonstrations"],
            "entropy": total["entropy"] / num_tokens,
            "tokens/trained": total["num_tokens"],
            "mismatch/logprob_abs_max": largest.item(),
            "mismatch/logprob_abs_mean": total["abs_sum"] / num_tokens,
            "mismatch/kl_k3": total["k3_sum"] / num_tokens,
        }

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Tokens], *, temperature: float) -> list[Floats]:
        """Each [T - 1]: log-prob of every token after the first, on all ranks of the copy."""
        if not sequences:
            return []
        samples = [
            demonstration_sample(str(index), tokens[:1], tokens[1:], weight=0.0, count=0.0)
            for index, tokens in enumerate(sequences)
        ]
        micro_batch = pack(samples)

        def forward_step(
            micro_batches: Iterator[MicroBatch], model: torch.nn.Module
        ) -> tuple[Tensor, Any]:
            targets_T = self._tensor(next(micro_batches).target_ids).long()

            def logprobs_of(output: Tensor, non_loss_data: bool) -> Tensor:
                return token_logprobs(output[0], targets_T, temperature=temperature)

            return self.logits(model, micro_batch), logprobs_of

        (found_T,) = self._run(forward_step, [micro_batch], self.module, forward_only=True) or [
            torch.empty(len(micro_batch.token_ids), device=self._device)
        ]
        if self._mesh.pp_size > 1:
            last = self._mesh.pp_size - 1
            dist.broadcast(found_T, group=self._mesh.pp_group, group_src=last)
        return np.split(found_T.cpu().numpy(), micro_batch.cu_seqlens[1:-1])

    def export(self) -> Iterator[tuple[str, Tensor]]:
        parameters = local_parameters(self.module)
        return full_tensors(self.module, self._family, self._mesh, parameters)


def _finalize_without_count(
    model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
) -> None:
    """Step 4 of the module's derivation."""
    finalize_model_grads(model, None, **kwargs)

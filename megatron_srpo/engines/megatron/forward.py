"""Packed micro-batches through the policy, over pipeline, tensor and context parallel ranks.

    micro-batch -> hidden states of this rank's part -> what is made of them, on the last stage

Legend: T packed tokens, H hidden size, V padded vocabulary / TP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_srpo.batching import pack
from megatron_srpo.config_sections import KernelConfig
from megatron_srpo.data import demonstration_sample
from megatron_srpo.engines.megatron.context import with_others, zigzag
from megatron_srpo.engines.megatron.fp8 import token_multiple
from megatron_srpo.engines.megatron.logprobs import HEADS
from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.names import Heads
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.stopping import StopPoints, StopRequested
from megatron_srpo.types import Floats, MicroBatch, Tokens

R = TypeVar("R")
T = TypeVar("T")


class Forward:
    """The parts of the policy that this rank holds, and how they are run."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        mesh: Mesh,
        heads: Heads,
        kernels: KernelConfig = KernelConfig(),
        points: StopPoints | None = None,
    ) -> None:
        """`models`: chunks of an interleaved pipeline, or the one of any other. Each micro-batch is
        one of `points`."""
        self._models, self._mesh, self._heads = list(models), mesh, heads
        self._head = HEADS[kernels.head]
        self._points = points or StopPoints()
        self.is_stopping = False
        """The rest of the running schedule is empty; at its end comes `StopRequested`."""
        self._device = next(models[0].parameters()).device

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        finish: Callable[[int, Tensor], tuple[Tensor, R]],
        *,
        forward_only: bool,
    ) -> list[R]:
        """Megatron's schedule. `finish` makes of a micro-batch's index and hidden states
        [T / CP, H] its loss and a result; results come in the order of the micro-batches, from the
        last stage only.

        Raises `StopRequested`, on all ranks, if the run is to stop at one of these micro-batches.
        The schedule is run to its end also then, since the stages of a pipeline wait for each
        other, but nothing is computed for that micro-batch and those behind it.
        """
        passed, self.is_stopping = self._points.num_passed, False

        def forward_step(indices: Iterator[int], model: torch.nn.Module) -> tuple[Tensor, Any]:
            index = next(indices)
            if not self._points.passes(passed + index):
                self.is_stopping = True
                return _passed_through(model), _no_loss

            def loss_func(output: Tensor) -> tuple[Tensor, Tensor, R]:
                loss, result = finish(index, output[0])
                return loss, torch.zeros((), dtype=torch.int), result

            return self._chunk_output(model, micro_batches[index]), loss_func

        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=one_or_all([iter(range(len(micro_batches))) for _ in self._models]),
            model=one_or_all(self._models),
            num_microbatches=len(micro_batches),
            seq_length=max(len(m.token_ids) for m in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if self.is_stopping:
            raise StopRequested
        return results

    def _chunk_output(self, model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
        cu_seqlens = self.tensor(micro_batch.cu_seqlens)
        longest = int(np.diff(micro_batch.cu_seqlens).max())
        # Padding is part of its sequence; under context parallelism Transformer Engine asks.
        padded: Any = cu_seqlens if self._mesh.cp_size > 1 else None
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return model(
            self._own_part(micro_batch.token_ids, cu_seqlens)[None],
            self._own_part(micro_batch.position_ids, cu_seqlens)[None],
            None,
            packed_seq_params=packed,
        )

    def _own_part(self, ids: np.ndarray, cu_seqlens: Tensor) -> Tensor:
        """[T / CP] of this context parallel rank."""
        ids_T = self.tensor(ids).long()
        if self._mesh.cp_size == 1:
            return ids_T
        return ids_T[zigzag(cu_seqlens, self._mesh.cp_size)[self._mesh.cp_rank]]

    def tensor(self, array: np.ndarray) -> Tensor:
        """On the policy's device."""
        return torch.tensor(array, device=self._device)

    @property
    def _head_weight(self) -> Tensor:
        """[V, H], on the last stage."""
        chunk: Any = unwrap_model(self._models[-1])
        if chunk.share_embeddings_and_output_weights:
            return chunk.shared_embedding_or_output_weight()
        return chunk.output_layer.weight

    @property
    def _main_grad(self) -> Tensor | None:
        """[V, H] where DistributedDataParallel adds up the head's gradients, if it does."""
        is_trained = isinstance(self._models[-1], DistributedDataParallel)
        weight: Any = self._head_weight
        return weight.main_grad if is_trained and torch.is_grad_enabled() else None

    def logprobs(
        self, hidden_TH: Tensor, micro_batch: MicroBatch, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """[T] log-probs of the targets and [T] entropies, on every context parallel rank; 0 where
        the loss has no weight. Only log-probs that this rank computed have a gradient."""
        cu_seqlens = self.tensor(micro_batch.cu_seqlens)
        logprobs_T, entropies_T = self._head(
            hidden_TH,
            self._head_weight,
            self._own_part(micro_batch.target_ids, cu_seqlens),
            self._own_part(micro_batch.loss_weight != 0, cu_seqlens).bool(),
            temperature=temperature,
            num_real=self._num_real,
            group=self._mesh.tp_group,
            main_grad_VH=self._main_grad,
        )
        return (
            self._of_all_ranks(logprobs_T, micro_batch),
            self._of_all_ranks(entropies_T.detach(), micro_batch),
        )

    def _of_all_ranks(self, own: Tensor, micro_batch: MicroBatch) -> Tensor:
        """[T / CP, ...] -> [T, ...]"""
        if self._mesh.cp_size == 1:
            return own
        return with_others(own, self.tensor(micro_batch.cu_seqlens), self._mesh.cp_group)

    @property
    def _num_real(self) -> int:
        """How many columns of this rank's logits are tokens that exist."""
        num_columns = self._heads.padded_vocab_size // self._mesh.tp_size
        real = self._heads.vocab_size - self._mesh.tp_rank * num_columns
        return min(max(real, 0), num_columns)

    @torch.no_grad()
    def target_logprobs(
        self, micro_batches: Sequence[MicroBatch], *, temperature: float
    ) -> list[Tensor]:
        """[T] each, under the weights that are in the model now, 0 where the loss has no weight.
        Only the last stage knows them: on the others it is room to receive them into."""

        def finish(index: int, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
            found_T, _ = self.logprobs(hidden_TH, micro_batches[index], temperature=temperature)
            return found_T.sum(), found_T  # the schedule wants a loss; nothing descends it

        found = self.run(micro_batches, finish, forward_only=True)
        return found or [torch.empty(len(m.token_ids), device=self._device) for m in micro_batches]

    def sequence_logprobs(self, sequences: Sequence[Tokens], *, temperature: float) -> list[Floats]:
        """Each [T - 1]: log-prob of every token after the first, on all ranks of the copy."""
        if not sequences:
            return []
        found = self.target_logprobs(self._alone(sequences), temperature=temperature)
        if self._mesh.pp_size > 1:
            for logprobs_T in found:
                last = self._mesh.pp_size - 1
                dist.broadcast(logprobs_T, group=self._mesh.pp_group, group_src=last)
        return [
            logprobs_T[: len(tokens) - 1].cpu().numpy()
            for tokens, logprobs_T in zip(sequences, found, strict=False)
        ]

    def logits(self, sequences: Sequence[Tokens]) -> list[Tensor]:
        """Each [T - 1, vocabulary] float32, on the last stage only: to be compared, not to train.
        At least one sequence."""
        mesh, micro_batches = self._mesh, self._alone(sequences)

        def finish(index: int, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
            wide_TV = F.linear(hidden_TH, self._head_weight).float()
            shards = [torch.empty_like(wide_TV) for _ in range(mesh.tp_size)]
            dist.all_gather(shards, wide_TV, group=mesh.tp_group)
            full_TV = torch.cat(shards, dim=-1)[:, : self._heads.vocab_size]
            full_TV = self._of_all_ranks(full_TV, micro_batches[index])
            return full_TV.sum(), full_TV  # the schedule wants a loss; nothing descends it

        with torch.no_grad():
            found = self.run(micro_batches, finish, forward_only=True)
        return [
            full_TV[: len(tokens) - 1] for tokens, full_TV in zip(sequences, found, strict=False)
        ]

    def _alone(self, sequences: Sequence[Tokens]) -> list[MicroBatch]:
        """A micro-batch for each sequence, all whose targets have a weight, and empty ones until
        their number is legal."""
        chunk: Any = unwrap_model(self._models[0])
        multiple = token_multiple(chunk.config)
        layout = PackLayout.on(self._mesh, max_tokens=1, fp8_multiple=multiple)
        samples = [
            demonstration_sample("", tokens[:1], tokens[1:], weight=1.0, count=0.0)
            for tokens in sequences
        ]
        padding = -len(samples) % layout.count_multiple
        return [pack([sample], layout) for sample in samples] + [pack([], layout)] * padding


def _passed_through(model: torch.nn.Module) -> Tensor:
    """What a stage sends on without computing anything: what it received, the first one a token of
    zeros as the next one expects it: where the weights are, and in the dtype of the pipeline. No
    parameter computes, so no hook of DistributedDataParallel waits for the others."""
    chunk: Any = unwrap_model(model)
    received = None if chunk.pre_process else chunk.decoder.input_tensor
    if received is None:
        weight, config = next(chunk.parameters()), chunk.config
        return torch.zeros(
            1, 1, config.hidden_size,
            dtype=config.pipeline_dtype, device=weight.device, requires_grad=True,
        )  # fmt: skip
    return received.clone()


def _no_loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
    return output.sum() * 0, torch.zeros((), dtype=torch.int), None


def one_or_all(of_chunks: list[T]) -> T | list[T]:
    """Megatron's schedules want a list only of an interleaved pipeline's chunks."""
    return of_chunks[0] if len(of_chunks) == 1 else of_chunks

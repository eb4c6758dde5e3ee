"""Adam with Megatron's distributed optimizer, gradient clipping and learning-rate schedule."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_srpo.config_precision import Fp8Config
from megatron_srpo.config_sections import OptimizerConfig
from megatron_srpo.engines.megatron.cpu import cuda_type_names
from megatron_srpo.engines.megatron.fp8 import optimizer_fields
from megatron_srpo.engines.megatron.upstream import (
    load_states,
    parts_of,
    sharded_states,
    write_weights,
)
from megatron_srpo.types import InputError


class MegatronAdam:
    """Optimizer and schedule. One learning rate can serve several updates."""

    def __init__(
        self,
        models: Sequence[DistributedDataParallel],
        cfg: OptimizerConfig,
        *,
        fp8: Fp8Config,
        dtype: torch.dtype,
        num_steps: int,
    ) -> None:
        """Raises `InputError` if what an offloaded state needs is not there (that the model is
        bfloat16, `Config` has seen)."""
        if cfg.offload_fraction:
            _check_offload(cfg.offload_fraction)
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.beta1,
            adam_beta2=cfg.beta2,
            adam_eps=cfg.eps,
            clip_grad=cfg.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=models[0].ddp_config.overlap_param_gather,
            **optimizer_fields(fp8),
            optimizer_cpu_offload=cfg.offload_fraction > 0,
            optimizer_offload_fraction=cfg.offload_fraction,
            overlap_cpu_optimizer_d2h_h2d=True,
            # Else float32 parameters stay on the GPU, and a checkpoint cannot be loaded.
            use_precision_aware_optimizer=cfg.offload_fraction > 0,
        )
        self._is_of_fp8 = fp8.param_gather
        with cuda_type_names():
            self._optimizer = get_megatron_optimizer(
                config, [*models], use_gloo_process_groups=False
            )
        self._schedule = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=cfg.lr,
            min_lr=cfg.min_lr,
            lr_warmup_steps=cfg.warmup_steps,
            lr_decay_steps=max(num_steps, cfg.warmup_steps + 1),
            lr_decay_style=cfg.decay,
            start_wd=cfg.weight_decay,
            end_wd=cfg.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self._optimizer.scale_loss(loss)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def advance(self) -> float:
        """To the next learning rate, before a step's updates, also if there are none."""
        # Megatron's warm-up gives its first step a rate of 0; ours begins with 1/warmup_steps.
        self._schedule.step(1)
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> float:
        """Clip, step; returns the gradient norm before clipping."""
        with cuda_type_names():
            done: Any = self._optimizer.step()
        _, grad_norm, _ = done
        return float(grad_norm)

    def tensors(self) -> Iterator[Tensor]:
        """Float32 parameters and Adam's state, as far as there is one; those of the model among
        them, where it is float32 itself."""
        for part in parts_of(self._optimizer):
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def sharded_state(
        self, model_state: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
    ) -> dict[str, Any]:
        """Of Adam; the model's sharded state says where each parameter belongs. Collective."""
        return sharded_states(self._optimizer, model_state, metadata, is_loading=is_loading)

    def schedule_state(self) -> dict[str, Any]:
        return self._schedule.state_dict()

    def load(self, state: dict[str, Any], schedule: dict[str, Any]) -> None:
        """As they came out of a checkpoint."""
        load_states(self._optimizer, state)
        if self._is_of_fp8:
            write_weights(self._optimizer)
        self._schedule.num_steps = 0  # Megatron adds the checkpoint's number to it
        self._schedule.load_state_dict(schedule)


def _check_offload(fraction: float) -> None:
    """Megatron would pass over the one, and end in a TypeError without the other."""
    named = f"optimizer.offload_fraction={fraction:g}"
    if not torch.cuda.is_available():
        raise InputError(f"{named} needs a GPU: here all is in host memory; leave it at 0")
    if importlib.util.find_spec("transformer_engine") is None:
        raise InputError(f"{named} needs Transformer Engine, which is not installed; leave it at 0")

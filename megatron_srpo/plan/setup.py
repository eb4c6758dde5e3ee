"""What is planned?   config, shape of the model, GPUs -> sizes of the layout, all that divides"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch

from megatron_srpo.config import Config
from megatron_srpo.engines.megatron.backend import Backend, Machine, check_model, choose
from megatron_srpo.inputs import check_engine_fits, check_layout, check_prompts_divide
from megatron_srpo.pack_layout import PackLayout
from megatron_srpo.plan.hardware import Gpu, known
from megatron_srpo.plan.shape import Shape, read_shape
from megatron_srpo.types import InputError

CUDA = (13, 0)
"""Of the torch that runs: every recipe's is older."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run on some GPUs."""

    cfg: Config
    shape: Shape
    gpu: Gpu
    num_gpus: int

    def check(self) -> None:
        """Raises `InputError` for what does not divide, as `train` would."""
        cfg, model = self.cfg, self.shape.model
        layout = {"num_processes": self.num_gpus, "rollout_tp": cfg.rollout.tp}
        check_layout(cfg.parallel, model, **layout)
        check_model(self.backend, model, cfg.parallel)
        check_prompts_divide(cfg, self.num_engines)
        check_engine_fits(cfg, model)
        for knob, size in (("parallel.tp", cfg.parallel.tp), ("rollout.tp", cfg.rollout.tp)):
            if size > (most := self.gpu.per_node):
                raise InputError(f"{knob}={size} is more than the {most} GPUs of a node")

    @property
    def backend(self) -> Backend:
        """As it is chosen where Transformer Engine is installed. Raises `InputError` for an FP8
        that the GPU has not."""
        machine = Machine(capability=self.gpu.capability, cuda=CUDA, engine="there")
        return choose(self.cfg, machine)

    @property
    def fp8_share(self) -> float:
        """Of the trainer's layers whose linear maps multiply in FP8."""
        fp8 = self.cfg.fp8
        return (fp8.recipe != "none") * (1 - 2 * fp8.first_last_bf16 / self.shape.num_layers)

    @property
    def model_size(self) -> int:
        """GPUs that hold one copy of the policy, context parallel ones not counted."""
        return self.cfg.parallel.tp * self.cfg.parallel.pp

    @property
    def dp(self) -> int:
        """Copies of the policy, each of which has its own samples."""
        return self.num_gpus // (self.model_size * self.cfg.parallel.cp)

    @property
    def copies(self) -> int:
        """Ranks that hold the same dense weights, and share their optimizer state."""
        return self.num_gpus // self.model_size

    @property
    def expert_copies(self) -> int:
        """The same of experts."""
        parallel = self.cfg.parallel
        within = parallel.tp if parallel.ep == 1 else 1
        return self.num_gpus // (parallel.pp * parallel.ep * within)

    @property
    def num_engines(self) -> int:
        """Rollout engines."""
        return self.num_gpus // self.cfg.rollout.tp

    @property
    def element_bytes(self) -> int:
        """Of a weight or an activation."""
        return {"float32": 4, "bfloat16": 2}[self.cfg.dtype]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is trained on."""
        return self.cfg.data.max_prompt_tokens + self.cfg.rollout.max_response_tokens

    @property
    def micro_batch_tokens(self) -> int:
        """Of the largest micro-batch there can be, on all ranks that share it."""
        parallel = self.cfg.parallel
        layout = PackLayout.of(
            num_slots=self.dp,
            max_tokens=self.cfg.micro_batch_tokens,
            tp=parallel.tp,
            cp=parallel.cp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            fp8_multiple=self.cfg.fp8.token_multiple,
        )
        multiple = layout.total_multiple
        return max(layout.capacity, ceil(layout.padded(self.longest) / multiple) * multiple)


def setup_here(cfg: Config, *, num_gpus: int) -> Setup | None:
    """On this process's GPU, with the memory that its driver says; None without one that a plan
    knows."""
    kind = known(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if kind is None:
        return None
    gpu = replace(kind, memory_bytes=torch.cuda.mem_get_info()[1])
    return Setup(cfg=cfg, shape=read_shape(cfg.model), gpu=gpu, num_gpus=num_gpus)

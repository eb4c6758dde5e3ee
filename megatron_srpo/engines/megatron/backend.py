"""Whose layers, attention and optimizer compute, and in what?   config, machine -> Backend, and why

Imports nothing of Megatron, which makes some of these choices itself, by what it can import, and
ignores what it cannot do (FP8 over its own layers: the same loss in bf16, no word of it). Here they
are known before anything is built, and what would be ignored is refused.

    transformer_engine   its linears, a norm before one being part of it; its norms elsewhere; its
                         attention (FlashAttention or cuDNN); experts in one grouped product; rotary
                         positions and SwiGLU in one kernel each; FP8
    local                Megatron's linears, `layers.RMSNorm`, `attention.py` on torch's; no FP8

Norms over all heads (OLMo) are ours in both, and so is the head. The optimizer is Megatron's pick:
Transformer Engine's FusedAdam, Apex's, torch's AdamW, whichever it can import first.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from megatron_srpo.config import Config
from megatron_srpo.config_precision import Fp8Config
from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.hf_config import head_size, num_kv_heads
from megatron_srpo.types import InputError

Capability = tuple[int, int]
NEEDS: dict[str, tuple[Capability, Capability | None]] = {
    "delayed": ((8, 9), None),
    "tensorwise": ((8, 9), None),
    "blockwise": ((9, 0), None),
    "mxfp8": ((10, 0), (12, 0)),
}
"""Recipe -> compute capability from which on, and up to which, a GPU can (Transformer Engine
2.14.1, pytorch/quantization.py, check_*_support)."""
BLOCKWISE_CUDA = (12, 9)
"""torch's CUDA from which on blocks can be scaled (there, check_fp8_block_scaling_support)."""
ROLLOUT_NEEDS: Capability = (8, 9)
"""Below, vLLM multiplies FP8 weights in bf16: memory is saved and no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this process finds."""

    capability: Capability | None
    """Compute capability of its GPU; None: it has none."""
    cuda: tuple[int, ...] = ()
    """Version of CUDA that torch was built with."""
    engine: str | None = None
    """Transformer Engine's version, if it can be imported."""
    engine_lacks: str = ""
    """Why it cannot."""
    has_apex: bool = False
    """NVIDIA's, with its optimizers."""
    has_fused_gradients: bool = False
    """Apex' kernel that adds a weight's gradient to what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the trainer is built from."""

    layers: Literal["local", "transformer_engine"]
    fp8: Fp8Config
    fuses_gradients: bool = False
    notes: tuple[str, ...] = ()
    """For the log: what, and why."""

    @property
    def is_engine(self) -> bool:
        """Transformer Engine's."""
        return self.layers == "transformer_engine"


LOCAL = Backend(layers="local", fp8=Fp8Config())


def this_machine() -> Machine:
    """Transformer Engine and Apex are of no use without a GPU, and are then not looked for."""
    if not torch.cuda.is_available():
        return Machine(capability=None)
    # Of a node with too few GPUs `preflight` will tell: here they are alike.
    device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    engine, lacks = _engine()
    return Machine(
        capability=torch.cuda.get_device_capability(device),
        cuda=tuple(int(part) for part in (torch.version.cuda or "0").split(".")),
        engine=engine,
        engine_lacks=lacks,
        has_apex=find_spec("apex") is not None and find_spec("amp_C") is not None,
        has_fused_gradients=find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def _engine() -> tuple[str | None, str]:
    """As Megatron finds out: by importing it."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        return None, (str(error).splitlines() or [type(error).__name__])[0]
    return str(importlib.import_module("transformer_engine").__version__), ""


def machine_for(cfg: Config) -> Machine:
    """One that has what the config names: a job is submitted where no GPU need be."""
    wants_engine = cfg.fp8.recipe != "none" or cfg.backend == "transformer_engine"
    if not wants_engine and not cfg.fp8.rollout:
        return Machine(capability=None)
    capability, _ = NEEDS.get(cfg.fp8.recipe, (ROLLOUT_NEEDS, None))
    engine = "there" if wants_engine else None
    return Machine(capability=capability, cuda=BLOCKWISE_CUDA, engine=engine)


def backend_of(cfg: Config) -> Backend:
    """On this machine. Raises `InputError`, see `choose`."""
    return choose(cfg, this_machine())


def choose(cfg: Config, machine: Machine) -> Backend:
    """Raises `InputError` for layers that cannot be had, and for FP8 that would be ignored."""
    lack = _lack(machine)
    if cfg.backend == "transformer_engine" and lack:
        raise InputError(f"backend=transformer_engine: {lack}")
    check_rollouts(cfg.fp8, machine)
    if cfg.fp8.recipe != "none":
        _check_recipe(cfg.fp8, machine)
    why_local = lack
    if cfg.backend == "local":
        why_local = "backend=local"
    elif cfg.backend == "auto" and cfg.dtype == "float32":
        why_local = lack or "Transformer Engine's attention is fast in bf16, and dtype is float32"
    why = why_local or f"Transformer Engine {machine.engine} on {_gpu(machine)}"
    notes = [f"layers: {'local' if why_local else 'transformer_engine'} ({why})"]
    notes.append(f"optimizer: {_optimizer(machine)}")
    if cfg.precision == "fp8":
        rollouts = "in FP8, of vLLM's making" if cfg.fp8.rollout else cfg.dtype
        notes.append(f"FP8 recipe of the trainer: {cfg.fp8.recipe}; weights of vLLM: {rollouts}")
    return Backend(
        layers="local" if why_local else "transformer_engine",
        fp8=cfg.fp8,
        fuses_gradients=not why_local and machine.has_fused_gradients,
        notes=tuple(notes),
    )


def _lack(machine: Machine) -> str:
    """What Transformer Engine's layers want for; nothing if they can be had."""
    if machine.capability is None:
        return "there is no GPU"
    if machine.engine is None:
        return f"Transformer Engine cannot be imported ({machine.engine_lacks})"
    return ""


def _gpu(machine: Machine) -> str:
    assert machine.capability is not None
    return "a GPU of compute capability {}.{}".format(*machine.capability)


def _optimizer(machine: Machine) -> str:
    """Megatron's pick (0.16.1, core/optimizer/__init__.py)."""
    if machine.engine is not None:
        return "Transformer Engine's FusedAdam"
    return "Apex's FusedAdam" if machine.has_apex else "torch's AdamW"


def check_rollouts(fp8: Fp8Config, machine: Machine) -> None:
    """Raises `InputError` if vLLM could not multiply in FP8 here."""
    if fp8.rollout and (machine.capability is None or machine.capability < ROLLOUT_NEEDS):
        has = "there is no GPU" if machine.capability is None else f"this is {_gpu(machine)}"
        raise InputError(f"fp8.rollout needs a GPU of compute capability 8.9 at least: {has}")


def _check_recipe(fp8: Fp8Config, machine: Machine) -> None:
    if lack := _lack(machine):
        raise InputError(
            f"fp8.recipe={fp8.recipe}: {lack}, and without Transformer Engine's layers it would be "
            "ignored"
        )
    first, end = NEEDS[fp8.recipe]
    assert machine.capability is not None
    if machine.capability < first or (end is not None and machine.capability >= end):
        below = "" if end is None else " and less than {}.{}".format(*end)
        raise InputError(
            f"fp8.recipe={fp8.recipe} needs compute capability {first[0]}.{first[1]}{below}: this "
            f"is {_gpu(machine)}"
        )
    if fp8.recipe == "blockwise" and machine.cuda < BLOCKWISE_CUDA:
        has = ".".join(str(part) for part in machine.cuda)
        raise InputError(f"fp8.recipe=blockwise needs a torch for CUDA 12.9 or later, not {has}")


def check_model(backend: Backend, model: Mapping[str, Any], parallel: ParallelConfig) -> None:
    """The model (its completed config) on this layout has shapes that the backend can compute.
    Raises `InputError`; `inputs.check_layout` has found that it divides at all."""
    if not backend.is_engine:
        return
    if head_size(model) % 8:
        raise InputError(
            f"the model's head size, {head_size(model)}, does not divide by 8, as Transformer "
            "Engine's attention wants it; backend=local takes it"
        )
    if parallel.cp > 1 and "sliding_attention" in (model.get("layer_types") or ()):
        raise InputError(
            f"parallel.cp={parallel.cp}: Transformer Engine cannot share sequences among processes "
            "that pass keys around where layers have sliding windows; parallel.cp=1, or "
            "backend=local, which is right and slow"
        )
    if backend.fp8.recipe != "none":
        _check_shapes(backend.fp8, model, parallel)


def _check_shapes(fp8: Fp8Config, model: Mapping[str, Any], parallel: ParallelConfig) -> None:
    """Of what a process multiplies: `assert_dim_for_fp8_exec` (2.14.1, pytorch/utils.py) and, the
    other way round in the backward pass, the same; MXFP8 tensors have blocks of 32."""
    tp, heads = parallel.tp, model["num_attention_heads"]
    groups = max(num_kv_heads(model), tp)  # several processes may hold one
    widths = {
        "hidden_size": model["hidden_size"],
        "queries": heads * head_size(model) // tp,
        "queries, keys and values": (heads + 2 * groups) * head_size(model) // tp,
        "intermediate_size": model["intermediate_size"] // tp,
        "moe_intermediate_size": (model.get("moe_intermediate_size") or 0)
        // (tp if parallel.ep == 1 else 1),
    }
    multiple = fp8.token_multiple
    for name, width in widths.items():
        if width % multiple:
            raise InputError(
                f"fp8.recipe={fp8.recipe} multiplies widths that divide by {multiple}: the "
                f"model's {name} on each of parallel.tp={tp} processes, {width}, does not"
            )
    per_stage = model["num_hidden_layers"] // parallel.pp
    if fp8.first_last_bf16 > per_stage:
        raise InputError(
            f"fp8.first_last_bf16={fp8.first_last_bf16} is more than the {per_stage} layers of a "
            f"stage (parallel.pp={parallel.pp})"
        )

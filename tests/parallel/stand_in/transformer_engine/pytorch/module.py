"""Linears and norms with TE's parameters."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.tensor import QuantizedTensor, held


class Scaled(torch.nn.Module):
    """With an extra state, as all modules of TE have; in FP8 it is the largest input so far."""

    largest: float | None = None

    def see(self, x: Tensor, weight: Tensor) -> None:
        """`assert_dim_for_fp8_exec` (2.14.1, pytorch/utils.py), and 16 where Megatron pads so."""
        if not FP8GlobalStateManager.is_fp8_enabled() or not x.numel():
            return
        for tensor in (x, weight):
            assert math.prod(tensor.shape[:-1]) % 16 == 0 and tensor.shape[-1] % 16 == 0, (
                f"FP8 execution of {tuple(tensor.shape)}"
            )
        self.largest = max(self.largest or 0.0, float(x.detach().abs().max()))

    def get_extra_state(self) -> Tensor:
        if self.largest is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.largest)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel():
            self.largest = pickle.loads(state.numpy().tobytes())


def mark(weight: Tensor, dim: int) -> None:
    """`set_tensor_model_parallel_attributes` (2.14.1, pytorch/distributed.py)."""
    marks: Any = weight
    marks.tensor_model_parallel, marks.partition_dim, marks.partition_stride = True, dim, 1


def plain(weight: Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


class Linear(Scaled):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_name: str | None = None,
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        assert not return_bias and not fuse_wgrad_accumulation
        self.tp_size, self.tp_group, self.parallel_mode = tp_size, tp_group, parallel_mode
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.use_bias, self.save_original_input = bias, save_original_input
        weight = torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device)
        if FP8GlobalStateManager.makes_weights:
            self.weight = held(torch.zeros_like(weight))
        else:
            self.weight = torch.nn.Parameter(weight)
        mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(self.out_features, dtype=params_dtype))
            if parallel_mode == "column":
                mark(self.bias, 0)
        else:
            self.bias = torch.Tensor()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        self.see(inp, self.weight)
        if self.parallel_mode == "column" and self.tp_size > 1:
            whole = (
                mappings.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else mappings.copy_to_tensor_model_parallel_region
            )
            inp = whole(inp, group=self.tp_group)
        out = F.linear(inp, plain(self.weight), self.bias if self.use_bias else None)
        if self.parallel_mode == "row" and self.tp_size > 1:
            summed = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region
            )
            out = summed(out, group=self.tp_group)
        return out


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            **others,
        )
        assert normalization == "RMSNorm" and not zero_centered_gamma
        self.eps = eps
        linear = dict(self._parameters)
        self._parameters.clear()
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self._parameters.update(linear)
        marks: Any = self.layer_norm_weight
        marks.sequence_parallel = self.sequence_parallel

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        normed = F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, is_first_microbatch)


class GroupedLinear(Scaled):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not bias and tp_size == 1, "experts are parallel by hand"
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
            self.register_parameter(f"weight{index}", weight)
            mark(weight, 1 if parallel_mode == "row" else 0)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...

    def get_extra_state(self) -> Tensor:
        """Megatron takes the real one apart, expert by expert: not the stand-in's."""
        return torch.empty(0, dtype=torch.uint8)

    def forward(
        self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        parts = inp.split(m_splits)
        out = []
        for index, part in enumerate(parts):
            weight = getattr(self, f"weight{index}")
            self.see(part, weight)
            out.append(F.linear(part, weight))
        return torch.cat(out)


class RMSNorm(Scaled):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        size = normalized_shape if hidden_size is None else hidden_size
        assert size is not None
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
        if sequence_parallel is not None:
            marks: Any = self.weight
            marks.sequence_parallel = sequence_parallel

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, input.shape[-1:], self.weight, self.eps)


class LayerNorm(torch.nn.Module): ...


class Fp8Padding(torch.nn.Module):
    """To 16 tokens for each expert (2.14.1, module/fp8_padding.py)."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        padded = [-(-number // 16) * 16 for number in m_splits]
        parts = [
            F.pad(part, (0, 0, 0, number - len(part)))
            for part, number in zip(inp.split(m_splits), padded, strict=True)
        ]
        return torch.cat(parts), padded


class Fp8Unpadding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        padded = [-(-number // 16) * 16 for number in m_splits]
        parts = inp.split(padded)
        return torch.cat([part[:n] for part, n in zip(parts, m_splits, strict=True)])

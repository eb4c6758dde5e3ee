"""A weight that is held in FP8: rounded to e4m3 under one scale whenever it is written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(value: Tensor) -> Tensor:
    scale = value.float().abs().max().clamp(min=1e-12) / LARGEST
    return ((value.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(value.dtype)


class QuantizedTensor(Tensor):
    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def copy_(self, value: Tensor, *others: Any) -> QuantizedTensor:  # type: ignore[override]
        self.as_subclass(Tensor).copy_(rounded(value))
        return self

    def get_high_precision_init_val(self) -> Tensor:
        return self.high_precision


def held(weight: Tensor) -> torch.nn.Parameter:
    quantized = rounded(weight).as_subclass(QuantizedTensor)
    parameter = torch.nn.Parameter(quantized)
    parameter.high_precision = weight.clone()  # type: ignore[attr-defined]
    return parameter

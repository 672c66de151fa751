"""Packed weights to bfloat16 in torch."""

from __future__ import annotations

from torch import Tensor

from llmserve.ops.cuda.dequantize import check_arguments
from llmserve.ops.cuda.quantized_linear import QuantizedWeight
from tests.cuda.emulation.quantized_linear import values_of


def dequantize(weight: QuantizedWeight, out: Tensor) -> None:
    check_arguments(weight, out)
    out.copy_(values_of(weight).to(out.dtype))

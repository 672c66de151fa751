"""Linear layers of int8 rows and int8 weights (`csrc/cuda/int8_linear.cu`)."""

from __future__ import annotations

import ctypes
from typing import Final, Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import CudaLibrary, check_dense, check_device, pointer
from llmserve.ops.cuda.linear import LinearArgs, Workspace, check_linear, linear_args
from llmserve.ops.cuda.packing import WHOLE_ROW
from llmserve.ops.cuda.quantized_linear import QuantizedWeight, check_weight

MOST_INPUTS: Final = 2**31 // 128**2 - 1
"""Whose sums an int32 holds."""


class Int8Linear(Protocol):
    """The launcher."""

    def __call__(
        self,
        x: Tensor,
        x_scales: Tensor,
        weight: QuantizedWeight,
        out: Tensor,
        *,
        workspace: Workspace,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """`out = (x W^T) * weight scales * x_scales + bias + residual`: exact integer sums, scaled in float32.

        x is int8 [rows, inputs], inputs a multiple of 16, rows at multiples of 16 bytes; x_scales float32 [rows]; the
        weight has codes of 8 bits and one float32 scale for each output. The others are as for `QuantizedLinear`.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("linear", LinearArgs),
        ("x_scales", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


def launcher(library: CudaLibrary) -> Int8Linear:
    """The compiled kernel."""

    def int8_linear(
        x: Tensor,
        x_scales: Tensor,
        weight: QuantizedWeight,
        out: Tensor,
        *,
        workspace: Workspace,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        check_arguments(x, x_scales, weight, out, workspace=workspace, bias=bias, residual=residual)
        arguments = _Args(
            linear=linear_args(x, out, workspace=workspace, bias=bias, residual=residual),
            x_scales=pointer(x_scales),
            codes=pointer(weight.codes),
            scales=pointer(weight.scales),
        )
        library.call("int8_linear", arguments)

    return int8_linear


def takes(weight: QuantizedWeight) -> bool:
    """Whether it is of the only kind that is multiplied as integers."""
    is_int8 = weight.bits == 8 and weight.group == WHOLE_ROW and weight.scales.dtype == torch.float32
    return is_int8 and weight.biases is None and weight.inputs % 16 == 0 and weight.inputs <= MOST_INPUTS


def check_arguments(
    x: Tensor,
    x_scales: Tensor,
    weight: QuantizedWeight,
    out: Tensor,
    *,
    workspace: Workspace,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check_weight(weight)
    if not takes(weight):
        raise ValueError("weight: must be int8 with one float32 scale for each output, and inputs a multiple of 16")
    shape = weight.outputs, weight.inputs
    check_linear(x, out, dtype=torch.int8, shape=shape, workspace=workspace, bias=bias, residual=residual)
    check_dense("x_scales", x_scales, dtypes=(torch.float32,), shape=tuple(x.shape[:1]))
    check_device(x=x, x_scales=x_scales, weight=weight.codes)

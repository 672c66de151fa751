"""Linear layers of bfloat16 whose bits do not depend on the batch (`csrc/cuda/fixed_linear.cu`)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import CudaLibrary, check, check_device, pointer
from llmserve.ops.cuda.linear import LinearArgs, Workspace, check_linear, check_rows, linear_args


class FixedLinear(Protocol):
    """The launcher."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        workspace: Workspace,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """`out = x W^T + bias + residual`, all sums in float32, rounded once.

        x is bfloat16 [rows, inputs] and weight [outputs, inputs], inputs a multiple of 8, rows of both at multiples of
        16 bytes. The others are as for `QuantizedLinear`. A row's outputs have the same bits in every batch.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("linear", LinearArgs),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
    )


def launcher(library: CudaLibrary) -> FixedLinear:
    """The compiled kernel."""

    def fixed_linear(
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        workspace: Workspace,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        check_arguments(x, weight, out, workspace=workspace, bias=bias, residual=residual)
        arguments = _Args(
            linear=linear_args(x, out, workspace=workspace, bias=bias, residual=residual),
            weight=pointer(weight),
            weight_stride=weight.stride(0),
        )
        library.call("fixed_linear", arguments)

    return fixed_linear


def check_arguments(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    workspace: Workspace,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check("weight", weight, dtypes=(torch.bfloat16,), shape=tuple(weight.shape[:2]))
    check_rows("weight", weight)
    shape = weight.shape[0], weight.shape[1]
    check_linear(x, out, dtype=torch.bfloat16, shape=shape, workspace=workspace, bias=bias, residual=residual)
    check_device(x=x, weight=weight)

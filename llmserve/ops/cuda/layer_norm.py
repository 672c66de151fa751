"""Layer norm of rows (`csrc/cuda/layer_norm.cu`)."""

from __future__ import annotations

import ctypes
from typing import Final, Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import (
    TYPES,
    CudaLibrary,
    check,
    check_dense,
    check_device,
    check_quantized,
    pointer,
)

_DTYPES: Final = (torch.bfloat16, torch.float32)


class LayerNorm(Protocol):
    """The launcher."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        eps: float,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """`out = (x - mean) / sqrt(variance + eps) * weight + bias` by rows.

        x is bfloat16 or float32 [rows, columns], out bfloat16, both with dense rows; weight and bias are float32.
        `residual` and `scales` are those of `RmsNorm`.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> LayerNorm:
    """The compiled kernel."""

    def layer_norm(
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        eps: float,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        check_arguments(x, weight, out, bias, residual, scales)
        arguments = _Args(
            x=pointer(x),
            residual=pointer(residual),
            weight=pointer(weight),
            bias=pointer(bias),
            out=pointer(out),
            scales=pointer(scales),
            rows=x.shape[0],
            columns=x.shape[1],
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            eps=eps,
            type=TYPES[x.dtype],
        )
        library.call("layer_norm", arguments)

    return layer_norm


def check_arguments(
    x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None, scales: Tensor | None
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check("x", x, dtypes=_DTYPES, shape=x.shape[:1] + weight.shape)
    check("weight", weight, dtypes=(torch.float32,), shape=weight.shape[:1])
    check_quantized(out, scales, dtype=torch.bfloat16, shape=tuple(x.shape))
    if bias is not None:
        check("bias", bias, dtypes=(torch.float32,), shape=tuple(weight.shape))
    if residual is not None:
        check_dense("residual", residual, dtypes=(torch.float32,), shape=tuple(x.shape))
    check_device(x=x, weight=weight, bias=bias, out=out, residual=residual, scales=scales)

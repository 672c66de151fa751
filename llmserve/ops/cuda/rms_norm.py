"""RMS norm of rows (`csrc/cuda/rms_norm.cu`)."""

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


class RmsNorm(Protocol):
    """The launcher."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        eps: float,
        residual: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """`out = x / rms(x) * weight` by rows.

        x is bfloat16 or float32 [rows, columns], out bfloat16, both with dense rows; weight is float32. With
        `residual` (float32, dense, of x's shape) it becomes `residual + x` first, and that is what is normalized.

        With `scales`, float32 [rows], out is int8: scale = the largest magnitude of the row / 127, and the values over
        the scale, rounded half to even from float32; a row of zeros has scale 0, and one that holds a NaN or an
        infinity a scale that is not finite either.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> RmsNorm:
    """The compiled kernel."""

    def rms_norm(
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        eps: float,
        residual: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        check_arguments(x, weight, out, residual, scales)
        arguments = _Args(
            x=pointer(x),
            residual=pointer(residual),
            weight=pointer(weight),
            out=pointer(out),
            scales=pointer(scales),
            rows=x.shape[0],
            columns=x.shape[1],
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            eps=eps,
            type=TYPES[x.dtype],
        )
        library.call("rms_norm", arguments)

    return rms_norm


def check_arguments(
    x: Tensor, weight: Tensor, out: Tensor, residual: Tensor | None, scales: Tensor | None = None
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check("x", x, dtypes=_DTYPES, shape=x.shape[:1] + weight.shape)
    check("weight", weight, dtypes=(torch.float32,), shape=weight.shape[:1])
    check_quantized(out, scales, dtype=torch.bfloat16, shape=tuple(x.shape))
    if residual is not None:
        check_dense("residual", residual, dtypes=(torch.float32,), shape=tuple(x.shape))
    check_device(x=x, weight=weight, out=out, residual=residual, scales=scales)

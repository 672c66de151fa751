"""Rows to int8 with a scale each (`csrc/cuda/quantize_rows.cu`)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer


class QuantizeRows(Protocol):
    """The launcher."""

    def __call__(self, x: Tensor, codes: Tensor, scales: Tensor) -> None:
        """`scales = max |x| / 127` by rows, `codes = round(x / scales)`, half to even; rows of zeros have scale 0.

        x is bfloat16 [rows, columns], codes int8 alike, both with dense rows; scales is float32 [rows]. The scale of a
        row that is not finite is not finite.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("codes_stride", ctypes.c_int64),
    )


def launcher(library: CudaLibrary) -> QuantizeRows:
    """The compiled kernel."""

    def quantize_rows(x: Tensor, codes: Tensor, scales: Tensor) -> None:
        check_arguments(x, codes, scales)
        arguments = _Args(
            x=pointer(x),
            codes=pointer(codes),
            scales=pointer(scales),
            rows=x.shape[0],
            columns=x.shape[1],
            x_stride=x.stride(0),
            codes_stride=codes.stride(0),
        )
        library.call("quantize_rows", arguments)

    return quantize_rows


def check_arguments(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check("x", x, dtypes=(torch.bfloat16,), shape=tuple(x.shape[:2]))
    check("codes", codes, dtypes=(torch.int8,), shape=tuple(x.shape))
    check_dense("scales", scales, dtypes=(torch.float32,), shape=tuple(x.shape[:1]))
    check_device(x=x, codes=codes, scales=scales)

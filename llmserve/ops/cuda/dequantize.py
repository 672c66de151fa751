"""Packed weights back to bfloat16 rows (`csrc/cuda/dequantize.cu`)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import TYPES, CudaLibrary, check, check_device, pointer
from llmserve.ops.cuda.linear import check_rows
from llmserve.ops.cuda.quantized_linear import QuantizedWeight, check_weight


class Dequantize(Protocol):
    """The launcher."""

    def __call__(self, weight: QuantizedWeight, out: Tensor) -> None:
        """`out = W`, bfloat16 [outputs, inputs], columns as they are stored; rows at multiples of 16 bytes.

        Each value is scaled in float32 and rounded to bfloat16.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> Dequantize:
    """The compiled kernel."""

    def dequantize(weight: QuantizedWeight, out: Tensor) -> None:
        check_arguments(weight, out)
        arguments = _Args(
            codes=pointer(weight.codes),
            scales=pointer(weight.scales),
            biases=pointer(weight.biases),
            out=pointer(out),
            outputs=weight.outputs,
            inputs=weight.inputs,
            out_stride=out.stride(0),
            bits=weight.bits,
            group=weight.group,
            scale_type=TYPES[weight.scales.dtype],
        )
        library.call("dequantize", arguments)

    return dequantize


def check_arguments(weight: QuantizedWeight, out: Tensor) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check_weight(weight)
    check("out", out, dtypes=(torch.bfloat16,), shape=(weight.outputs, weight.inputs))
    check_rows("out", out)
    check_device(weight=weight.codes, out=out)

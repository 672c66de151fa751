"""The columns of rows in another order (`csrc/cuda/gather_columns.cu`)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer


class GatherColumns(Protocol):
    """The launcher."""

    def __call__(self, x: Tensor, order: Tensor, out: Tensor) -> None:
        """`out[:, j] = x[:, order[j]]`.

        x and out are bfloat16 [rows, columns] with dense rows and do not overlap; order is int32 [columns].
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
    )


def launcher(library: CudaLibrary) -> GatherColumns:
    """The compiled kernel."""

    def gather_columns(x: Tensor, order: Tensor, out: Tensor) -> None:
        check_arguments(x, order, out)
        arguments = _Args(
            x=pointer(x),
            order=pointer(order),
            out=pointer(out),
            rows=x.shape[0],
            columns=x.shape[1],
            x_stride=x.stride(0),
            out_stride=out.stride(0),
        )
        library.call("gather_columns", arguments)

    return gather_columns


def check_arguments(x: Tensor, order: Tensor, out: Tensor) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check_dense("order", order, dtypes=(torch.int32,), shape=tuple(order.shape[:1]))
    check("x", x, dtypes=(torch.bfloat16,), shape=tuple(x.shape[:1]) + tuple(order.shape))
    check("out", out, dtypes=(torch.bfloat16,), shape=tuple(x.shape))
    check_device(x=x, order=order, out=out)

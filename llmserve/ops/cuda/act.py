"""Activation functions, gated or not (`csrc/cuda/act.cu`)."""

from __future__ import annotations

import ctypes
from typing import Final, Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import TYPES, CudaLibrary, check, check_device, check_quantized, pointer
from llmserve.ops.protocol import ActKind

_KINDS: Final[dict[ActKind, int]] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}


class Act(Protocol):
    """The launcher."""

    def __call__(self, x: Tensor, out: Tensor, *, kind: ActKind, scales: Tensor | None = None) -> None:
        """`out = kind(gate) * up` by rows, or `kind(x)`.

        out is [T, F]. x is bfloat16 or float32 with dense rows: [T, 2 F], gate | up, or [T, F] where nothing gates.
        Arithmetic is float32. out is bfloat16, or with `scales` (float32 [T]) int8 as in `RmsNorm`.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> Act:
    """The compiled kernel."""

    def act(x: Tensor, out: Tensor, *, kind: ActKind, scales: Tensor | None = None) -> None:
        check_arguments(x, out, kind, scales)
        arguments = _Args(
            x=pointer(x),
            out=pointer(out),
            scales=pointer(scales),
            rows=out.shape[0],
            columns=out.shape[1],
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            kind=_KINDS[kind],
            gated=int(is_gated(x, out)),
            type=TYPES[x.dtype],
        )
        library.call("act", arguments)

    return act


def is_gated(x: Tensor, out: Tensor) -> bool:
    """Whether x has a gate before what it gates."""
    return bool(x.shape[1] != out.shape[1])


def check_arguments(x: Tensor, out: Tensor, kind: ActKind, scales: Tensor | None) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    if kind not in _KINDS:
        raise ValueError(f"kind: {kind} is not one of {', '.join(_KINDS)}")
    if out.ndim != 2 or x.ndim != 2:
        raise ValueError("out: it and x have rows and columns")
    check_quantized(out, scales, dtype=torch.bfloat16, shape=(x.shape[0], out.shape[1]))
    check(
        "x",
        x,
        dtypes=(torch.bfloat16, torch.float32),
        shape=(x.shape[0], out.shape[1] * (2 if is_gated(x, out) else 1)),
    )
    check_device(x=x, out=out, scales=scales)

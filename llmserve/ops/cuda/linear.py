"""What the linear layers have in common: `csrc/cuda/linear.h`, the workspace of sums, and how many slices a sum has.

Invariant: the number of slices depends on the weight's shape alone, so the sums of a row do not depend on the batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llmserve.ops.cuda.library import TYPES, check, check_dense, check_device, pointer

SLICES: Final = 8
"""The warps of a block of the streaming kernel, each with a slice: what the number of slices is a multiple of."""
TILE: Final = 64
"""Inputs of a tile, the unit of slices."""
NUM_COUNTERS: Final = 4096
_BLOCKS: Final = 256
"""Blocks of eight warps that keep the memory of a large GPU busy."""
_TILES_OF_SLICE: Final = 4
"""A warp with fewer tiles spends its time starting and ending."""
OUT_DTYPES: Final = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory that the linear layers of one stream share, one after the other."""

    sums: Tensor
    """uint8, any number of bytes; sums that do not fit are made by fewer blocks."""
    counters: Tensor
    """int32, zero between launches."""


def make_workspace(num_bytes: int, device: torch.device) -> Workspace:
    """Without contents that matter, but for the counters."""
    return Workspace(
        torch.empty(num_bytes, dtype=torch.uint8, device=device),
        torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device),
    )


def num_slices(outputs: int, inputs: int) -> int:
    """Parts that the sum over the inputs is cut into: eight for each block that a strip of 16 outputs needs."""
    strips, tiles = -(-outputs // 16), -(-inputs // TILE)
    blocks = min(-(-_BLOCKS // strips), tiles // (SLICES * _TILES_OF_SLICE))
    return SLICES * max(1, blocks)


class LinearArgs(ctypes.Structure):
    """`LinearArgs` of csrc/cuda/linear.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("residual_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("workspace_bytes", ctypes.c_int64),
        ("num_counters", ctypes.c_int64),
        ("slices", ctypes.c_int32),
        ("out_type", ctypes.c_int32),
    )


def linear_args(
    x: Tensor, out: Tensor, *, workspace: Workspace, bias: Tensor | None, residual: Tensor | None
) -> LinearArgs:
    """Of arguments that were checked."""
    return LinearArgs(
        x=pointer(x),
        bias=pointer(bias),
        residual=pointer(residual),
        out=pointer(out),
        workspace=pointer(workspace.sums),
        counters=pointer(workspace.counters),
        rows=x.shape[0],
        outputs=out.shape[1],
        inputs=x.shape[1],
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        out_stride=out.stride(0),
        workspace_bytes=workspace.sums.numel(),
        num_counters=workspace.counters.numel(),
        slices=num_slices(out.shape[1], x.shape[1]),
        out_type=TYPES[out.dtype],
    )


def check_linear(
    x: Tensor,
    out: Tensor,
    *,
    dtype: torch.dtype,
    shape: tuple[int, int],
    workspace: Workspace,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """`shape`: outputs and inputs of the weight. Raises `ValueError` naming the argument that no kernel could take."""
    outputs, inputs = shape
    rows = x.shape[0] if x.ndim == 2 else 0
    check("x", x, dtypes=(dtype,), shape=(rows, inputs))
    check_rows("x", x)
    check("out", out, dtypes=OUT_DTYPES, shape=(rows, outputs))
    if bias is not None:
        check_dense("bias", bias, dtypes=(torch.float32,), shape=(outputs,))
    if residual is not None:
        check("residual", residual, dtypes=(torch.float32,), shape=(rows, outputs))
    check_dense("workspace", workspace.sums, dtypes=(torch.uint8,), shape=tuple(workspace.sums.shape[:1]))
    check_dense("workspace", workspace.counters, dtypes=(torch.int32,), shape=tuple(workspace.counters.shape[:1]))
    check_device(x=x, out=out, bias=bias, residual=residual, workspace=workspace.sums, counters=workspace.counters)


def check_rows(name: str, tensor: Tensor) -> None:
    """Rows that are read 16 bytes at a time."""
    width = 16 // tensor.element_size()
    if tensor.data_ptr() % 16 != 0 or (tensor.shape[0] > 1 and tensor.stride(0) % width != 0):
        raise ValueError(f"{name}: its rows must begin at multiples of 16 bytes")
    if tensor.shape[1] % 8 != 0:
        raise ValueError(f"{name}: {tensor.shape[1]} columns are not a multiple of 8")

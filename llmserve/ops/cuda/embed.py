"""Rows of an embedding table (`csrc/cuda/embed.cu`)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import TYPES, CudaLibrary, check, check_dense, check_device, pointer


class Embed(Protocol):
    """The launcher."""

    def __call__(
        self,
        ids: Tensor,
        table: Tensor,
        out: Tensor,
        *,
        scale: float = 1.0,
        positions: Tensor | None = None,
        position_table: Tensor | None = None,
        type_row: Tensor | None = None,
    ) -> None:
        """`out = table[ids] * scale + position_table[positions] + type_row`, summed in float32 and rounded once.

        ids and positions are int32 [T], each a row of its table: nothing checks that on a GPU. Tables are dense
        bfloat16 [rows, hidden], type_row is [hidden], out is bfloat16 or float32 [T, hidden] with
        dense rows.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("position_table", ctypes.c_void_p),
        ("type_row", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> Embed:
    """The compiled kernel."""

    def embed(
        ids: Tensor,
        table: Tensor,
        out: Tensor,
        *,
        scale: float = 1.0,
        positions: Tensor | None = None,
        position_table: Tensor | None = None,
        type_row: Tensor | None = None,
    ) -> None:
        check_arguments(ids, table, out, positions, position_table, type_row)
        arguments = _Args(
            ids=pointer(ids),
            table=pointer(table),
            positions=pointer(positions),
            position_table=pointer(position_table),
            type_row=pointer(type_row),
            out=pointer(out),
            rows=out.shape[0],
            columns=out.shape[1],
            out_stride=out.stride(0),
            scale=scale,
            type=TYPES[out.dtype],
        )
        library.call("embed", arguments)

    return embed


def check_arguments(
    ids: Tensor,
    table: Tensor,
    out: Tensor,
    positions: Tensor | None,
    position_table: Tensor | None,
    type_row: Tensor | None,
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    bf16, rows, hidden = (torch.bfloat16,), ids.shape[0], table.shape[-1]
    check_dense("ids", ids, dtypes=(torch.int32,), shape=(rows,))
    check_dense("table", table, dtypes=bf16, shape=(table.shape[0], hidden))
    check("out", out, dtypes=(torch.bfloat16, torch.float32), shape=(rows, hidden))
    if (positions is None) != (position_table is None):
        raise ValueError("positions: they and their table come together")
    if positions is not None and position_table is not None:
        check_dense("positions", positions, dtypes=(torch.int32,), shape=(rows,))
        check_dense("position_table", position_table, dtypes=bf16, shape=(position_table.shape[0], hidden))
    if type_row is not None:
        check_dense("type_row", type_row, dtypes=bf16, shape=(hidden,))
    check_device(ids=ids, table=table, out=out, positions=positions, position_table=position_table, type_row=type_row)

"""Norm of heads, rotation, and the cache (`csrc/cuda/kv_append.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.kv_cache import CacheFields, KvCache, cache_fields, check_aligned, check_cache
from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer

_BF16: Final = (torch.bfloat16,)
_F32: Final = (torch.float32,)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding of the first `rotary_dim` values of a head."""

    table: Tensor  # float32 [positions, rotary_dim / 2, 2]: cosine and sine, times the attention factor
    style: Literal["half", "interleaved"] = "half"


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each head of queries and of keys; None: as they are."""

    q: Tensor | None  # float32 [head_dim]
    k: Tensor | None
    eps: float


class KvAppend(Protocol):
    """The launcher."""

    def __call__(
        self,
        qkv: Tensor,
        q_out: Tensor,
        cache: KvCache,
        positions: Tensor,
        slots: Tensor,
        *,
        rotation: Rotation | None = None,
        norm: HeadNorm | None = None,
    ) -> None:
        """Queries to q_out, keys and values to the cache: normed, then rotated, then rounded once.

        qkv is bfloat16 [tokens, (heads + 2 kv_heads) * head_dim], queries first, then keys, then values; q_out is
        bfloat16 [tokens, heads * head_dim]. Rows of both are dense and start at multiples of 16 bytes. positions is
        int32 [tokens] and below the rotation's, slots int64 [tokens]: block * block_size + offset, negative where the
        cache does not get the token (q_out does). Raises `ValueError`.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("q_out", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rope", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("qkv_stride", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("rotary_dim", ctypes.c_int64),
        ("cache", CacheFields),
        ("eps", ctypes.c_float),
        ("is_interleaved", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> KvAppend:
    """The compiled kernel."""

    def kv_append(
        qkv: Tensor,
        q_out: Tensor,
        cache: KvCache,
        positions: Tensor,
        slots: Tensor,
        *,
        rotation: Rotation | None = None,
        norm: HeadNorm | None = None,
    ) -> None:
        check_arguments(qkv, q_out, cache, positions, slots, rotation, norm)
        arguments = _Args(
            qkv=pointer(qkv),
            q_out=pointer(q_out),
            positions=pointer(positions),
            slots=pointer(slots),
            rope=None if rotation is None else pointer(rotation.table),
            q_norm=None if norm is None else pointer(norm.q),
            k_norm=None if norm is None else pointer(norm.k),
            tokens=qkv.shape[0],
            heads=q_out.shape[1] // cache.head_dim,
            qkv_stride=qkv.stride(0),
            q_stride=q_out.stride(0),
            rotary_dim=0 if rotation is None else 2 * rotation.table.shape[1],
            cache=cache_fields(cache),
            eps=0.0 if norm is None else norm.eps,
            is_interleaved=rotation is not None and rotation.style == "interleaved",
        )
        library.call("kv_append", arguments)

    return kv_append


def check_arguments(
    qkv: Tensor,
    q_out: Tensor,
    cache: KvCache,
    positions: Tensor,
    slots: Tensor,
    rotation: Rotation | None,
    norm: HeadNorm | None,
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check_cache(cache)
    tokens, head_dim = qkv.shape[0], cache.head_dim
    columns = q_out.shape[-1] if q_out.ndim == 2 else 0
    if columns == 0 or columns % head_dim != 0:
        raise ValueError(f"q_out: shape {tuple(q_out.shape)} is not rows of heads of {head_dim}")
    check("q_out", q_out, dtypes=_BF16, shape=(tokens, columns))
    check("qkv", qkv, dtypes=_BF16, shape=(tokens, columns + 2 * cache.kv_heads * head_dim))
    check_aligned(qkv=qkv, q_out=q_out)
    check_dense("positions", positions, dtypes=(torch.int32,), shape=(tokens,))
    check_dense("slots", slots, dtypes=(torch.int64,), shape=(tokens,))
    table = None if rotation is None else rotation.table
    if table is not None:
        if table.ndim != 3 or 2 * table.shape[1] > head_dim:
            raise ValueError(f"rotation: shape {tuple(table.shape)} does not fit heads of {head_dim}")
        check_dense("rotation", table, dtypes=_F32, shape=(*table.shape[:2], 2))
    weights = {} if norm is None else {"q_norm": norm.q, "k_norm": norm.k}
    for name, weight in weights.items():
        if weight is not None:
            check_dense(name, weight, dtypes=_F32, shape=(head_dim,))
    check_device(
        qkv=qkv, q_out=q_out, k_cache=cache.k, v_cache=cache.v, k_scales=cache.k_scales, v_scales=cache.v_scales,
        positions=positions, slots=slots, rotation=table, **weights,
    )  # fmt: skip

"""The paged cache of one layer (`csrc/cuda/kv_cache.h`): what every launcher that touches it checks and passes on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llmserve.ops.cuda.library import TYPES, check_dense, pointer

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
LARGEST: Final = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""What the largest magnitude of a token and head becomes, in the types that have scales."""
MOST_HEAD_DIM: Final = 256


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of one layer.

    k and v are dense [num_blocks, kv_heads, block_size, head_dim] in one of bfloat16, float16, float8_e4m3fn and int8;
    block_size is a power of two from 8 on, head_dim a multiple of 8 up to 256, of 16 where values have one byte. Those
    types have scales, float32 [num_blocks, kv_heads, block_size]: a token of a head is `values * scale`, the scale its
    largest magnitude / 448 (float8) or / 127 (int8).
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.k.shape[1])

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return int(self.k.shape[2])

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return int(self.k.shape[3])


class CacheFields(ctypes.Structure):
    """`KvCache` of csrc/cuda/kv_cache.h."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_scales", ctypes.c_void_p),
        ("v_scales", ctypes.c_void_p),
        ("kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def cache_fields(cache: KvCache) -> CacheFields:
    """For the kernels."""
    return CacheFields(
        k=pointer(cache.k),
        v=pointer(cache.v),
        k_scales=pointer(cache.k_scales),
        v_scales=pointer(cache.v_scales),
        kv_heads=cache.kv_heads,
        block_size=cache.block_size,
        head_dim=cache.head_dim,
        type=TYPES[cache.k.dtype],
    )


def check_cache(cache: KvCache) -> None:
    """Raises `ValueError` naming the tensor that no kernel could take."""
    if cache.k.ndim != 4:
        raise ValueError(f"k_cache: {cache.k.ndim} dimensions, expected [num_blocks, kv_heads, block_size, head_dim]")
    check_dense("k_cache", cache.k, dtypes=DTYPES, shape=tuple(cache.k.shape))
    check_dense("v_cache", cache.v, dtypes=(cache.k.dtype,), shape=tuple(cache.k.shape))
    size, head_dim, multiple = cache.block_size, cache.head_dim, 16 if cache.k.element_size() == 1 else 8
    if size < 8 or size & (size - 1) != 0:
        raise ValueError(f"k_cache: block_size {size} is not a power of two from 8 on")
    if not 0 < head_dim <= MOST_HEAD_DIM or head_dim % multiple != 0:
        raise ValueError(f"k_cache: head_dim {head_dim} is not a multiple of {multiple} up to {MOST_HEAD_DIM}")
    for name, scales in (("k_scales", cache.k_scales), ("v_scales", cache.v_scales)):
        if (scales is not None) != (cache.k.dtype in LARGEST):
            raise ValueError(f"{name}: {'missing' if scales is None else 'not taken'} with {cache.k.dtype}")
        if scales is not None:
            check_dense(name, scales, dtypes=(torch.float32,), shape=tuple(cache.k.shape[:3]))


def check_aligned(**tensors: Tensor) -> None:
    """That 16 bytes are loaded as one wherever a row starts. Raises `ValueError` naming the tensor."""
    for name, tensor in tensors.items():
        steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
        if tensor.data_ptr() % 16 != 0 or any(step % 16 != 0 for step in steps):
            raise ValueError(f"{name}: its rows are not aligned to 16 bytes")

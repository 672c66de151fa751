"""Copies of whole blocks of the KV cache (`csrc/cuda/copy_blocks.cu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import CudaLibrary, check_dense, check_device, pointer


class CopyBlocks(Protocol):
    """The launcher."""

    def __call__(self, pairs: Tensor, count: Tensor, tensors: Tensor, *, block_bytes: int) -> None:
        """Copy block `pairs[i, 0]` to block `pairs[i, 1]` in every tensor, for i below `count`.

        pairs is int64 [most_pairs, 2], count int32 [1], tensors int64 [num_tensors]: addresses as of `addresses`, all
        on the device. Block b of a tensor lies at b * block_bytes, a multiple of 16. No target is the source or target
        of another pair, which the block pool's copies hold to: a target was handed out free.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("pairs", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("most_pairs", ctypes.c_int64),
        ("num_tensors", ctypes.c_int64),
        ("block_bytes", ctypes.c_int64),
    )


def launcher(library: CudaLibrary) -> CopyBlocks:
    """The compiled kernel."""

    def copy_blocks(pairs: Tensor, count: Tensor, tensors: Tensor, *, block_bytes: int) -> None:
        check_arguments(pairs, count, tensors, block_bytes)
        arguments = _Args(
            pairs=pointer(pairs),
            count=pointer(count),
            tensors=pointer(tensors),
            most_pairs=pairs.shape[0],
            num_tensors=tensors.shape[0],
            block_bytes=block_bytes,
        )
        library.call("copy_blocks", arguments)

    return copy_blocks


def addresses(caches: Sequence[Tensor]) -> Tensor:
    """Where dense caches lie, for `tensors`; they must outlive it. Raises `ValueError` for one that cannot be."""
    for index, cache in enumerate(caches):
        if not cache.is_contiguous() or cache.data_ptr() % 16 != 0:
            raise ValueError(f"caches: number {index} is not dense or not aligned to 16 bytes")
    device = caches[0].device if caches else None
    return torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.int64, device=device)


def check_arguments(pairs: Tensor, count: Tensor, tensors: Tensor, block_bytes: int) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check_dense("pairs", pairs, dtypes=(torch.int64,), shape=(pairs.shape[0], 2))
    check_dense("count", count, dtypes=(torch.int32,), shape=(1,))
    check_dense("tensors", tensors, dtypes=(torch.int64,), shape=tensors.shape[:1])
    if block_bytes <= 0 or block_bytes % 16 != 0:
        raise ValueError(f"block_bytes: {block_bytes} is not a multiple of 16")
    check_device(pairs=pairs, count=count, tensors=tensors)

"""Stored tensor → float32, in NumPy. Owns the arithmetic of each block format; slow and obvious.

Little-endian layouts of one block of 32 values along the last axis (`d`, `m` are float16):

    q4_0  d | 16 bytes      value[i] = d * (low nibble[i] - 8),  value[i + 16] = d * (high nibble[i] - 8)
    q4_1  d | m | 16 bytes  value[i] = d * low nibble[i] + m,    value[i + 16] = d * high nibble[i] + m
    q8_0  d | 32 int8       value[i] = d * q[i]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.dtypes import BLOCKS
from llmserve.types import CheckpointTensor


def dequantize(tensor: CheckpointTensor) -> NDArray[np.float32]:
    """A writable float32 copy of `tensor`, in its shape. Raises `KeyError` for a dtype that no reader gives out."""
    if tensor.dtype == "f32":
        values = np.frombuffer(tensor.data, "<f4").astype(np.float32)
    elif tensor.dtype == "f16":
        values = np.frombuffer(tensor.data, "<f2").astype(np.float32)
    elif tensor.dtype == "bf16":
        values = (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = _dequantize_blocks(tensor)
    return values.reshape(tensor.shape)


def _dequantize_blocks(tensor: CheckpointTensor) -> NDArray[np.float32]:
    blocks = np.frombuffer(tensor.data, np.uint8).reshape(-1, BLOCKS[tensor.dtype][1])  # [num_blocks, block bytes]
    d = _half(blocks[:, :2])  # [num_blocks, 1]
    if tensor.dtype == "q8_0":
        return d * blocks[:, 2:].view(np.int8).astype(np.float32)
    if tensor.dtype == "q4_0":
        return d * (_nibbles(blocks[:, 2:]) - np.float32(8))
    return d * _nibbles(blocks[:, 4:]) + _half(blocks[:, 2:4])


def _half(columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)  # [num_blocks, 32]

"""Stored tensor → float32, in NumPy. Owns the arithmetic of plain types and of blocks of 32; slow and obvious.

Little-endian layouts of one block of 32 values along the last axis (`d`, `m` are float16). Codes of 4 bits: byte i
holds that of value i in its low nibble and that of value i + 16 in its high one. `h`: the fifth bits, one a value.

    q4_0    d | 16 bytes              value = d * (code - 8)
    q4_1    d | m | 16 bytes          value = d * code + m
    q5_0    d | h | 16 bytes          value = d * (code - 16)
    q5_1    d | m | h | 16 bytes      value = d * code + m
    q8_0    d | 32 int8               value = d * code
    iq4_nl  d | 16 bytes              value = d * CODEBOOK[code]

Blocks of 256: `dequantize_k`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.dequantize_k import CODEBOOK, dequantize_k
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
        elements, size = BLOCKS[tensor.dtype]
        blocks = np.frombuffer(tensor.data, np.uint8).reshape(-1, size)  # [num_blocks, block bytes]
        values = _dequantize_32(tensor.dtype, blocks) if elements == 32 else dequantize_k(tensor.dtype, blocks)
    values = values.reshape(tensor.shape)
    if tensor.order is None:
        return values
    ordered = np.empty_like(values)
    ordered[:, list(tensor.order)] = values
    return ordered


def _dequantize_32(dtype: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    d = _half(blocks[:, :2])  # [num_blocks, 1]
    match dtype:
        case "q4_0":
            return d * (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))
        case "q4_1":
            return d * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks[:, 2:4])
        case "q5_0":
            return d * (_five_bits(blocks[:, 2:]) - np.float32(16))
        case "q5_1":
            return d * _five_bits(blocks[:, 4:]) + _half(blocks[:, 2:4])
        case "q8_0":
            return d * blocks[:, 2:].view(np.int8).astype(np.float32)
        case "iq4_nl":
            return d * CODEBOOK[_nibbles(blocks[:, 2:])]
    raise KeyError(dtype)


def _half(columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([packed & 15, packed >> 4], axis=1)  # [num_blocks, 32]


def _five_bits(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    fifth = np.unpackbits(packed[:, :4], axis=1, bitorder="little")
    return (_nibbles(packed[:, 4:]) | fifth << 4).astype(np.float32)

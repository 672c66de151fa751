"""Stored tensor → float32, in NumPy. Owns all arithmetic but that of blocks of 256; slow and obvious.

Little-endian layouts of one block of 32 values along the last axis (`d`, `m` are float16). Codes of 4 bits: byte i
holds that of value i in its low nibble and that of value i + 16 in its high one. `h`: the fifth bits, one a value.

    q4_0    d | 16 bytes              value = d * (code - 8)
    q4_1    d | m | 16 bytes          value = d * code + m
    q5_0    d | h | 16 bytes          value = d * (code - 16)
    q5_1    d | m | h | 16 bytes      value = d * code + m
    q8_0    d | 32 int8               value = d * code
    iq4_nl  d | 16 bytes              value = d * CODEBOOK[code]

Blocks of 256: `dequantize_k`. Forms that no file has; their blocks have G = 32, 64 or 128 values, each 32 of them as
16 bytes like above:

    i4_gG   d | G / 2 bytes           value = d * (code - 8)
    u4_gG   d | m | G / 2 bytes       value = d * code + m
    i8      a row: its int8 codes, then one float32 scale; value = scale * code
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
    elif tensor.dtype == "i8":
        rows = np.frombuffer(tensor.data, np.uint8).reshape(-1, tensor.shape[-1] + 4)
        values = _float32(rows[:, -4:]) * rows[:, :-4].view(np.int8).astype(np.float32)
    else:
        elements, size = BLOCKS[tensor.dtype]
        blocks = np.frombuffer(tensor.data, np.uint8).reshape(-1, size)  # [num_blocks, block bytes]
        values = _dequantize_blocks(tensor.dtype, elements, blocks)
    values = values.reshape(tensor.shape)
    if tensor.order is None:
        return values
    ordered = np.empty_like(values)
    ordered[:, list(tensor.order)] = values
    return ordered


def _dequantize_blocks(dtype: str, elements: int, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    if dtype.startswith(("i4_", "u4_")):
        return _dequantize_int4(blocks, elements, symmetric=dtype.startswith("i4_"))
    return _dequantize_32(dtype, blocks) if elements == 32 else dequantize_k(dtype, blocks)


def _dequantize_int4(blocks: NDArray[np.uint8], elements: int, *, symmetric: bool) -> NDArray[np.float32]:
    packed = np.ascontiguousarray(blocks[:, 2 if symmetric else 4 :]).reshape(-1, 16)
    codes = _nibbles(packed).astype(np.float32).reshape(-1, elements)
    d = _half(blocks[:, :2])
    return d * (codes - np.float32(8)) if symmetric else d * codes + _half(blocks[:, 2:4])


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


def _float32(columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(columns).view("<f4").astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([packed & 15, packed >> 4], axis=1)  # [num_blocks, 32]


def _five_bits(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    fifth = np.unpackbits(packed[:, :4], axis=1, bitorder="little")
    return (_nibbles(packed[:, 4:]) | fifth << 4).astype(np.float32)

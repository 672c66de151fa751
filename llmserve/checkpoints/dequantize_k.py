"""Blocks of 256 values → float32, in NumPy: the K types and IQ4_XS.

A block is cut into groups of 16 or 32 consecutive values. A group has an integer scale `s` (and, where the type has
minimums, an integer `n`); the float16 `d` (and `m`) multiply them. Little-endian layouts:

    q2_k    16 bytes: s low, n high nibble | 64 bytes P | d | m    16  value = d*s * code - m*n, code of 2 bits
    q3_k    32 bytes H | 64 bytes P | 12 bytes of s | d            16  value = d*(s - 32) * (code - 4), 3 bits, top in H
    q4_k    d | m | 12 bytes of s and n | 128 bytes N              32  value = d*s * code - m*n, 4 bits
    q5_k    d | m | 12 bytes of s and n | 32 bytes H | 128 bytes N 32  value = d*s * code - m*n, 5 bits, top in H
    q6_k    128 bytes N | 64 bytes P | 16 int8: s | d              16  value = d*s * (code - 32), 6 bits, top two in P
    iq4_xs  d | 8 pairs | 8 nibbles | 128 bytes N                  32  value = d*(s - 32) * CODEBOOK[code]

N, nibbles: a run of bytes holds consecutive codes in its low nibbles, then as many in its high ones (runs of 32; of 64
in q6_k, of 16 in iq4_xs). P, pairs: byte i of each half of 32 bytes holds two bits for the values i, i + 32, i + 64 and
i + 96 of that half of the block, lowest first. H: bit j of byte i belongs to value 32*j + i.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CODEBOOK: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # fmt: skip
"""What the 16 codes of the IQ4 types stand for."""


def dequantize_k(dtype: str, blocks: Bytes) -> Floats:
    """[num_blocks, block bytes] → [num_blocks, 256]. Raises `KeyError` for another type."""
    match dtype:
        case "q2_k":
            return _q2_k(blocks)
        case "q3_k":
            return _q3_k(blocks)
        case "q4_k":
            return _with_minimums(blocks, _nibbles(blocks[:, 16:], 32))
        case "q5_k":
            return _with_minimums(blocks, _nibbles(blocks[:, 48:], 32) | _planes(blocks[:, 16:48]) << np.uint8(4))
        case "q6_k":
            return _q6_k(blocks)
        case "iq4_xs":
            return _iq4_xs(blocks)
    raise KeyError(dtype)


def _q2_k(blocks: Bytes) -> Floats:
    scales = _half(blocks[:, 80:82]) * (blocks[:, :16] & 15).astype(np.float32)
    minimums = _half(blocks[:, 82:84]) * (blocks[:, :16] >> 4).astype(np.float32)
    return _scaled(scales, _pairs(blocks[:, 16:80]).astype(np.float32), minimums)


def _q3_k(blocks: Bytes) -> Floats:
    codes = _pairs(blocks[:, 32:96]) | _planes(blocks[:, :32]) << 2
    # The upper two bits of scale g: pair g // 4 of byte g % 4.
    upper = np.concatenate([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    s = _nibbles(blocks[:, 96:104], 8) | upper << 4
    scales = _half(blocks[:, 108:110]) * (s.astype(np.float32) - np.float32(32))
    return _scaled(scales, codes.astype(np.float32) - np.float32(4))


def _q6_k(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, :128], 64) | _pairs(blocks[:, 128:192]) << 4
    scales = _half(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(scales, codes.astype(np.float32) - np.float32(32))


def _iq4_xs(blocks: Bytes) -> Floats:
    upper = np.stack([blocks[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(-1, 8)
    lower = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = _half(blocks[:, :2]) * ((lower | upper << 4).astype(np.float32) - np.float32(32))
    return _scaled(scales, CODEBOOK[_nibbles(blocks[:, 8:], 16)])


def _with_minimums(blocks: Bytes, codes: Bytes) -> Floats:
    """q4_k and q5_k: eight scales and eight minimums of 6 bits in bytes 4 to 15.

    The first four of each are the lower six bits of the first and second four bytes; the last four are nibbles of the
    third four bytes, with the upper two bits of the first and second as their own upper two.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    n = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    scales, minimums = _half(blocks[:, :2]) * s.astype(np.float32), _half(blocks[:, 2:4]) * n.astype(np.float32)
    return _scaled(scales, codes.astype(np.float32), minimums)


def _scaled(scales: Floats, codes: Floats, minimums: Floats | None = None) -> Floats:
    """`scales`, `minimums`: [num_blocks, groups]; `codes`: [num_blocks, 256]."""
    grouped = codes.reshape(*scales.shape, -1)
    values = scales[..., None] * grouped
    if minimums is not None:
        values = values - minimums[..., None]
    return values.reshape(codes.shape)


def _half(columns: Bytes) -> Floats:
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, run: int) -> Bytes:
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _pairs(packed: Bytes) -> Bytes:
    halves = packed.reshape(-1, 2, 1, 32)
    return np.concatenate([halves >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(-1, 256)


def _planes(packed: Bytes) -> Bytes:
    return np.concatenate([packed >> bit & 1 for bit in range(8)], axis=1)

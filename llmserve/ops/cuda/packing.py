"""Checkpoint quantization → the packed weights of `csrc/cuda/packed_weights.h`, which has the drawing. NumPy alone.

Owns which quantizations have a packed form. A packed value is `scale * code`, or `scale * code + bias`; symmetric codes
of 4 bits are stored plus 8. Invariants: packing is exact, so scales are float16 where the checkpoint's are, and float32
where they are products (`d * s` of the K types) or float32 themselves: half the bytes of scales is a tenth of the
weight at groups of 32. Types of 3, 5 and 6 bits and code books are widened to int8, which holds them exactly. What has
no exact form here (q2_k: groups of 16 with biases) is not packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.dequantize_k import CODEBOOK
from llmserve.checkpoints.dtypes import BLOCKS
from llmserve.types import CheckpointTensor

STRIP: Final = 16
"""Output channels of a tile."""
TILE: Final = 64
"""Inputs of a tile."""
STRIPS: Final = 2
"""Strips come in pairs: a warp of the tiled kernel takes two."""
WHOLE_ROW: Final = 0
"""As `group`: one scale for each output channel."""

Bytes = NDArray[np.uint8]
Scales = NDArray[Any]  # float16 or float32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [outputs, inputs] as the kernels read it."""

    bits: int
    """Of a code: 4 or 8."""
    group: int
    """Inputs that share a scale: 16 (with 8 bits, no biases), 32, 64, 128 or `WHOLE_ROW`."""
    outputs: int
    inputs: int
    codes: Bytes
    """[strips, tiles, bits / 4, 32 lanes, 16 bytes]."""
    scales: Scales
    """[strips, groups, 8, 2]; channels r and r + 8 of a strip lie side by side."""
    biases: Scales | None
    """Like the scales; None: the codes are symmetric."""
    order: NDArray[np.int32] | None
    """Column j of the weight multiplies input `order[j]`."""


@dataclass(frozen=True, slots=True)
class PlainCodes:
    """Codes and scales as rows: scale * code, or scale * code + bias; symmetric codes of 4 bits are stored plus 8."""

    bits: int
    codes: Bytes  # [outputs, inputs], as they are stored
    scales: Scales  # [outputs, groups]
    biases: Scales | None
    whole_row: bool = False


def pack(tensor: CheckpointTensor) -> PackedWeight | None:
    """None where the type has no exact packed form. Raises `ValueError` for anything but a matrix."""
    if len(tensor.shape) != 2:
        raise ValueError(f"{tensor.name}: shape {tensor.shape} is not that of a matrix")
    plain = plain_codes(tensor)
    outputs, inputs = tensor.shape
    if plain is None or inputs % 8 != 0:  # the kernels read eight inputs at a time
        return None
    padded = -(-outputs // (STRIP * STRIPS)) * STRIP * STRIPS, -(-inputs // TILE) * TILE
    group = WHOLE_ROW if plain.whole_row else inputs // plain.scales.shape[1]
    groups = padded[1] // group if group else 1
    codes = np.zeros(padded, np.uint8)
    codes[:outputs, :inputs] = plain.codes
    return PackedWeight(
        bits=plain.bits,
        group=group,
        outputs=outputs,
        inputs=inputs,
        codes=_tiles_of_4(codes) if plain.bits == 4 else _tiles_of_8(codes),
        scales=_strips(plain.scales, padded[0], groups),
        biases=None if plain.biases is None else _strips(plain.biases, padded[0], groups),
        order=None if tensor.order is None else np.array(tensor.order, np.int32),
    )


def concatenate(parts: Sequence[PackedWeight]) -> PackedWeight:
    """One weight with the outputs of all, one after the other.

    They have one form, order and number of inputs, and all but the last fill their pairs of strips.
    """
    first = parts[0]
    assert len({(part.bits, part.group, part.inputs, part.biases is None) for part in parts}) == 1
    assert all(part.outputs % (STRIP * STRIPS) == 0 for part in parts[:-1])
    return replace(
        first,
        outputs=sum(part.outputs for part in parts),
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        biases=None
        if first.biases is None
        else np.concatenate([part.biases for part in parts if part.biases is not None]),
    )


def unpack(packed: PackedWeight) -> NDArray[np.float32]:
    """[outputs, inputs], columns as they are stored: `order` is not undone."""
    codes = _rows_of_4(packed.codes) if packed.bits == 4 else _rows_of_8(packed.codes)
    values = codes.astype(np.float32)
    if packed.bits == 4 and packed.biases is None:
        values -= np.float32(8)
    width = packed.group or values.shape[1]
    values = values * np.repeat(_channels(packed.scales), width, axis=1)
    if packed.biases is not None:
        values = values + np.repeat(_channels(packed.biases), width, axis=1)
    return values[: packed.outputs, : packed.inputs]


def _tiles_of_4(codes: Bytes) -> Bytes:
    # [strip, +8 channels, channel, tile, half, quad, step, pair, in pair]
    parts = codes.reshape(codes.shape[0] // STRIP, 2, 8, codes.shape[1] // TILE, 2, 4, 2, 2, 2)
    nibbles = parts.transpose(0, 3, 2, 5, 4, 6, 8, 7, 1)  # [strip, tile, lane: 8 x 4, word: 2 x 2, byte: 2 x 2, nibble]
    packed = nibbles[..., 0] | nibbles[..., 1] << 4
    return np.ascontiguousarray(packed.reshape(parts.shape[0], parts.shape[3], 1, 32, 16))


def _rows_of_4(tiles: Bytes) -> Bytes:
    strips, num_tiles = tiles.shape[:2]
    nibbles = np.stack([tiles & 15, tiles >> 4], axis=-1).reshape(strips, num_tiles, 8, 4, 2, 2, 2, 2, 2)
    parts = nibbles.transpose(0, 8, 2, 1, 4, 3, 5, 7, 6)
    return parts.reshape(strips * STRIP, num_tiles * TILE)


def _tiles_of_8(codes: Bytes) -> Bytes:
    # [strip, +8 channels, channel, tile, half, quad, four, in four]
    parts = codes.reshape(codes.shape[0] // STRIP, 2, 8, codes.shape[1] // TILE, 2, 4, 2, 4)
    packed = parts.transpose(0, 3, 4, 2, 5, 6, 1, 7)  # [strip, tile, half, lane: 8 x 4, word: 2 x 2, byte]
    return np.ascontiguousarray(packed.reshape(parts.shape[0], parts.shape[3], 2, 32, 16))


def _rows_of_8(tiles: Bytes) -> NDArray[np.int8]:
    strips, num_tiles = tiles.shape[:2]
    parts = tiles.reshape(strips, num_tiles, 2, 8, 4, 2, 2, 4).transpose(0, 6, 3, 1, 2, 4, 5, 7)
    return parts.reshape(strips * STRIP, num_tiles * TILE).view(np.int8)


def _strips(scales: Scales, channels: int, groups: int) -> Scales:
    padded = np.zeros((channels, groups), scales.dtype)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    return np.ascontiguousarray(padded.reshape(-1, 2, 8, groups).transpose(0, 3, 2, 1))


def _channels(scales: Scales) -> NDArray[np.float32]:
    """[strips, groups, 8, 2] → [channels, groups]."""
    return scales.transpose(0, 3, 2, 1).reshape(-1, scales.shape[1]).astype(np.float32)


def plain_codes(tensor: CheckpointTensor) -> PlainCodes | None:
    """None where the type has no codes of 4 or 8 bits that say exactly what it says."""
    if tensor.dtype == "i8":
        rows = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], tensor.shape[1] + 4)
        return PlainCodes(8, rows[:, :-4], np.ascontiguousarray(rows[:, -4:]).view("<f4"), None, whole_row=True)
    _, size = BLOCKS[tensor.dtype]
    if tensor.dtype in ("f32", "f16", "bf16"):
        return None
    blocks = np.frombuffer(tensor.data, np.uint8).reshape(-1, size)
    found = _blocks_of_4(tensor.dtype, blocks) or _blocks_of_8(tensor.dtype, blocks)
    if found is None:
        return None
    biases = None if found.biases is None else found.biases.reshape(tensor.shape[0], -1)
    return PlainCodes(found.bits, found.codes.reshape(tensor.shape), found.scales.reshape(tensor.shape[0], -1), biases)


def _blocks_of_4(dtype: str, blocks: Bytes) -> PlainCodes | None:
    if dtype == "q4_0" or dtype.startswith("i4_"):
        return PlainCodes(4, _nibbles(blocks[:, 2:], 16), _half(blocks[:, :2]), None)
    if dtype == "q4_1" or dtype.startswith("u4_"):
        return PlainCodes(4, _nibbles(blocks[:, 4:], 16), _half(blocks[:, :2]), _half(blocks[:, 2:4]))
    if dtype == "q4_k":
        return PlainCodes(4, _nibbles(blocks[:, 16:], 32), *_six_bits(blocks))
    return None


def _blocks_of_8(dtype: str, blocks: Bytes) -> PlainCodes | None:
    match dtype:
        case "q8_0":
            return PlainCodes(8, blocks[:, 2:], _half(blocks[:, :2]), None)
        case "q5_0":
            codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
            return PlainCodes(8, codes - np.uint8(16), _half(blocks[:, :2]), None)  # wraps: they are read as int8
        case "q5_1":
            codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
            return PlainCodes(8, codes, _half(blocks[:, :2]), _half(blocks[:, 2:4]))
        case "q5_k":
            planes = np.concatenate([blocks[:, 16:48] >> bit & 1 for bit in range(8)], axis=1)
            return PlainCodes(8, _nibbles(blocks[:, 48:], 32) | planes << np.uint8(4), *_six_bits(blocks))
        case "q3_k":
            return _q3_k(blocks)
        case "q6_k":
            pairs = _pairs(blocks[:, 128:192]) << np.uint8(4)
            scales = _half(blocks[:, 208:]).astype(np.float32) * blocks[:, 192:208].view(np.int8).astype(np.float32)
            return PlainCodes(8, (_nibbles(blocks[:, :128], 64) | pairs) - np.uint8(32), scales, None)
        case "iq4_nl":
            return PlainCodes(8, _from_codebook(_nibbles(blocks[:, 2:], 16)), _half(blocks[:, :2]), None)
        case "iq4_xs":
            upper = np.stack([blocks[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(-1, 8)
            lower = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
            steps = (lower | upper << 4).astype(np.float32) - np.float32(32)
            scales = _half(blocks[:, :2]).astype(np.float32) * steps
            return PlainCodes(8, _from_codebook(_nibbles(blocks[:, 8:], 16)), scales, None)
    return None


def _q3_k(blocks: Bytes) -> PlainCodes:
    planes = np.concatenate([blocks[:, :32] >> bit & 1 for bit in range(8)], axis=1)
    codes = (_pairs(blocks[:, 32:96]) | planes << np.uint8(2)) - np.uint8(4)
    upper = np.concatenate([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    steps = (_nibbles(blocks[:, 96:104], 8) | upper << np.uint8(4)).astype(np.float32) - np.float32(32)
    return PlainCodes(8, codes, _half(blocks[:, 108:]).astype(np.float32) * steps, None)


def _six_bits(blocks: Bytes) -> tuple[Scales, Scales]:
    """Scales and biases of q4_k and q5_k, [num_blocks, 8] each (see `checkpoints.dequantize_k`)."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1).astype(np.float32)
    n = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1).astype(np.float32)
    return _half(blocks[:, :2]).astype(np.float32) * s, -(_half(blocks[:, 2:4]).astype(np.float32) * n)


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """Of each `run` bytes the low nibbles, then the high ones."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _pairs(packed: Bytes) -> Bytes:
    """Of each 32 bytes the lowest two bits, then the next, …"""
    halves = packed.reshape(-1, 2, 1, 32)
    return np.concatenate([halves >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(-1, 256)


def _fifth_bits(packed: Bytes) -> Bytes:
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _from_codebook(codes: Bytes) -> Bytes:
    return CODEBOOK.astype(np.int8)[codes].view(np.uint8)


def _half(columns: Bytes) -> Scales:
    return np.ascontiguousarray(columns).view("<f2")

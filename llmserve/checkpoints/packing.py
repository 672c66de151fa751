"""Integer weights of other layouts → the bytes of a form that executors read (`dequantize` draws them).

Scales and minimums of 4-bit forms and of `q8_0` are float16 there. A scale in float16 stays what it is. One in another
type is rounded, by no more than the relative precision of float16 (2^-11) times the matrix's largest scale; a weight
that this does not suffice for is refused. Zero points become minimums, m = -d * zero, rounded to float16: off by at
most 2^-11 of m, as the float16 arithmetic of these formats' own kernels is.

Invariant: converted a few rows at a time; what is in memory beside the result is a few bytes for each of `PIECE`
weights and the scales of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.dtypes import BLOCKS, num_bytes
from llmserve.errors import CheckpointError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

PIECE: Final = 1 << 22
"""Weights that are converted at a time."""
ROW_STEP: Final = 8
"""Rows of a piece come in eights: some layouts pack that many into a word."""
GROUPS_SAID: Final = "multiples of 32, and -1 for whole rows"


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A matrix of N outputs and K inputs: weight = scale * (code - zero)."""

    scales: Floats  # [N, groups]; the groups are of the same length
    zeros: Bytes | None  # [N, groups]; None: the middle of the codes
    codes: Callable[[slice], Bytes]
    """Codes of some rows, [n, K]. The slice starts at a multiple of `ROW_STEP`. Of `i8`, they are int8 in disguise."""


def form_of(bits: int, *, symmetric: bool, group: int) -> str | None:
    """The form that holds such weights; None if there is none. Groups are cut into blocks, which repeat the scale."""
    block = gcd(group, 128)
    if block < 32 or (bits, symmetric) == (8, False):
        return None
    if bits == 8:
        return "q8_0"
    return f"{'i' if symmetric else 'u'}4_g{block}"


def unpack(words: NDArray[np.int32], bits: int) -> Bytes:
    """Fields of 4 or 8 bits, the lowest ones first: [..., W] → [..., 32 / bits * W]."""
    pairs = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return pairs
    fields = np.empty((*pairs.shape, 2), np.uint8)
    np.bitwise_and(pairs, 15, out=fields[..., 0])
    np.right_shift(pairs, 4, out=fields[..., 1])
    return fields.reshape(*words.shape[:-1], -1)


def pack(
    dtype: str, columns: int, rows: slice, weight: IntegerWeight, *, fail: Callable[[str], CheckpointError]
) -> memoryview:
    """The bytes of some rows of a tensor of `dtype`, of which the first is a multiple of `ROW_STEP`.

    `fail` makes the error of a weight that the form cannot hold.
    """
    result = np.empty((rows.stop - rows.start, num_bytes(dtype, (1, columns))), np.uint8)
    if not np.isfinite(weight.scales).all():
        raise fail("has a scale that is not a number")
    header = _header(dtype, columns, weight, fail)  # [N, blocks, bytes before the codes]
    step = max(ROW_STEP, PIECE // columns // ROW_STEP * ROW_STEP)
    for first in range(rows.start, rows.stop, step):
        piece = slice(first, min(rows.stop, first + step))
        codes = weight.codes(piece)
        out = result[piece.start - rows.start : piece.stop - rows.start]
        if dtype == "i8":
            out[:, :columns] = codes
            out[:, columns:] = np.ascontiguousarray(weight.scales[piece], "<f4").view(np.uint8)
            continue
        elements, size = BLOCKS[dtype]
        blocks = out.reshape(len(codes), columns // elements, size)
        blocks[..., : size - _code_bytes(dtype)] = header[piece]
        blocks[..., size - _code_bytes(dtype) :] = _packed_codes(dtype, codes, elements)
    return result.reshape(-1).data.toreadonly()


def _code_bytes(dtype: str) -> int:
    elements = BLOCKS[dtype][0]
    return elements if dtype == "q8_0" else elements // 2


def _packed_codes(dtype: str, codes: Bytes, elements: int) -> Bytes:
    if dtype == "q8_0":
        return np.bitwise_xor(codes, np.uint8(128)).reshape(len(codes), -1, elements)  # code - 128, as int8
    halves = codes.reshape(len(codes), -1, elements // 32, 2, 16)
    packed: Bytes = halves[..., 0, :] | halves[..., 1, :] << np.uint8(4)
    return packed.reshape(len(codes), -1, elements // 2)


def _header(dtype: str, columns: int, weight: IntegerWeight, fail: Callable[[str], CheckpointError]) -> Bytes:
    has_zeros = dtype.startswith("u4")
    middle = 0 if dtype == "i8" else 128 if dtype == "q8_0" else 8
    if not has_zeros and weight.zeros is not None and (weight.zeros != middle).any():
        raise fail(f"has zero points other than {middle}, though its configuration says that it is symmetric")
    if dtype == "i8":
        return np.empty((len(weight.scales), 0, 0), np.uint8)
    d = _halves(weight.scales, fail)
    parts = [d]
    if has_zeros:
        assert weight.zeros is not None, "an asymmetric format has zero points"
        with np.errstate(over="ignore"):
            minimums = (-d.astype(np.float32) * weight.zeros).astype("<f2")  # the product is exact in float32
        if not np.isfinite(minimums).all():
            raise fail("has a scale whose zero point is beyond float16")
        parts.append(minimums)
    blocks = columns // BLOCKS[dtype][0]
    repeated = [np.repeat(part, blocks // part.shape[1], axis=1) for part in parts]
    return np.stack(repeated, axis=2).view(np.uint8)


def _halves(scales: Floats, fail: Callable[[str], CheckpointError]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        d = scales.astype("<f2")
    if not np.isfinite(d).all():
        raise fail(f"has the scale {scales.flat[np.abs(scales).argmax()]:g}, which is beyond float16")
    wrong = np.abs(d.astype(np.float32) - scales)
    if (wrong > 2.0**-11 * np.abs(scales).max()).any():
        raise fail(f"has the scale {scales.flat[wrong.argmax()]:g}, which float16 is too coarse for")
    return d

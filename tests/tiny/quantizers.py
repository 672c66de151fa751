"""Float32 matrices → blocks of every quantized type, by plain rounding: weights for tests, not for accuracy.

Types that the `gguf` package can quantize are left to it; the others are here. Each group of values gets a scale (and a
minimum) of its own, these are rounded to the integers of the block, and codes are chosen for what those stand for.
"""

from __future__ import annotations

from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

GGUF_TYPES: Final = {
    name: gguf.GGMLQuantizationType[name.upper()]
    for name in (
        "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
        "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    )
}  # fmt: skip
BLOCK_TYPES: Final = tuple(name for name in GGUF_TYPES if name not in ("f32", "f16", "bf16"))

INTEGER_TYPES: Final = ("i4_g32", "i4_g64", "i4_g128", "u4_g32", "u4_g64", "u4_g128", "i8")
"""Forms that no file holds."""

_CODEBOOK: Final = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def quantize(values: Floats, dtype: str) -> NDArray[Any]:
    """[rows, columns] → what a file stores: [rows, bytes of a row] for block types. Columns must be whole blocks."""
    encode = {"q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "iq4_xs": _iq4_xs}.get(dtype)
    if dtype == "iq4_nl":
        return _iq4_nl(values.reshape(-1, 1, 32)).reshape(*values.shape[:-1], -1)
    if encode is None:
        return gguf.quants.quantize(values, GGUF_TYPES[dtype])
    return encode(values.reshape(-1, 256)).reshape(*values.shape[:-1], -1)


def quantize_integers(values: Floats, dtype: str) -> Bytes:
    """[rows, columns] → [rows, bytes of a row] of one of `INTEGER_TYPES`. Columns must be whole groups."""
    if dtype == "i8":
        scale = (np.abs(values).max(axis=1, keepdims=True) / np.float32(127)).astype("<f4")
        signed = np.rint(values / np.where(scale == 0, 1, scale)).astype(np.int8)
        return np.concatenate([signed.view(np.uint8), scale.view(np.uint8)], axis=1)
    groups = values.reshape(-1, int(dtype[4:]))
    if dtype.startswith("i4"):
        d = (_extreme(groups[:, None])[:, 0] / np.float32(-8)).astype("<f2")
        codes, header = _nearest(groups, _step(d), -8, 7) + 8, [_halves(d)]
    else:
        low = groups.min(axis=1).astype("<f2")
        d = ((groups.max(axis=1) - low.astype(np.float32)) / np.float32(15)).astype("<f2")
        codes = _nearest(groups - low.astype(np.float32)[:, None], _step(d), 0, 15)
        header = [_halves(d), _halves(low)]
    return _joined(*header, _pack_nibbles(codes, 16)).reshape(len(values), -1)


def _step(d: NDArray[np.float16]) -> Floats:
    return d.astype(np.float32)[:, None]


def dequantize(stored: NDArray[Any], dtype: str) -> Floats:
    """What the `gguf` package makes of it."""
    return gguf.quants.dequantize(stored, GGUF_TYPES[dtype]).astype(np.float32)


def _q2_k(blocks: Floats) -> Bytes:
    d, m, s, n, codes = _with_minimums(blocks.reshape(-1, 16, 16), top_code=3, top_scale=15)
    return _joined(s | n << 4, _pack_pairs(codes), _halves(d), _halves(m))


def _q3_k(blocks: Floats) -> Bytes:
    d, s, steps = _centred(blocks.reshape(-1, 16, 16), lowest=-4, top_scale=31)
    codes = _nearest(blocks.reshape(-1, 16, 16), steps, -4, 3) + 4
    stored = s + 32
    upper = stored.reshape(-1, 4, 4) >> 4  # scale g = 4 * pair + byte
    scales = [_pack_nibbles(stored & 15, 8), sum(upper[:, pair] << 2 * pair for pair in range(4))]
    return _joined(_pack_planes(codes >> 2), _pack_pairs(codes & 3), *scales, _halves(d))


def _q4_k(blocks: Floats) -> Bytes:
    d, m, s, n, codes = _with_minimums(blocks.reshape(-1, 8, 32), top_code=15, top_scale=63)
    return _joined(_halves(d), _halves(m), _pack_k_scales(s, n), _pack_nibbles(codes, 32))


def _q5_k(blocks: Floats) -> Bytes:
    d, m, s, n, codes = _with_minimums(blocks.reshape(-1, 8, 32), top_code=31, top_scale=63)
    planes, nibbles = _pack_planes(codes >> 4), _pack_nibbles(codes & 15, 32)
    return _joined(_halves(d), _halves(m), _pack_k_scales(s, n), planes, nibbles)


def _q6_k(blocks: Floats) -> Bytes:
    d, s, steps = _centred(blocks.reshape(-1, 16, 16), lowest=-32, top_scale=127)
    codes = _nearest(blocks.reshape(-1, 16, 16), steps, -32, 31) + 32
    return _joined(_pack_nibbles(codes & 15, 64), _pack_pairs(codes >> 4), s, _halves(d))


def _iq4_nl(groups: Floats) -> Bytes:
    d = _extreme(groups)[:, 0] / np.float32(-127)
    codes = _nearest_in_codebook(groups, d.astype(np.float16).astype(np.float32)[:, None, None])
    return _joined(_halves(d), _pack_nibbles(codes, 16))


def _iq4_xs(blocks: Floats) -> Bytes:
    groups = blocks.reshape(-1, 8, 32)
    d, s, steps = _centred(groups, lowest=-127, top_scale=31)
    stored = s + 32
    upper = (stored >> 4).reshape(-1, 2, 4)
    lower = stored[:, 0::2] & 15 | (stored[:, 1::2] & 15) << 4
    upper_bytes = sum(upper[:, :, pair] << 2 * pair for pair in range(4))
    return _joined(_halves(d), upper_bytes, lower, _pack_nibbles(_nearest_in_codebook(groups, steps), 16))


def _extreme(groups: Floats) -> Floats:
    """The value of largest magnitude, with its sign, [num_blocks, groups]."""
    at = np.abs(groups).argmax(axis=2)[..., None]
    return np.take_along_axis(groups, at, axis=2)[..., 0]


def _centred(groups: Floats, *, lowest: int, top_scale: int) -> tuple[Floats, NDArray[np.int64], Floats]:
    """A step so that `lowest` of them are the group's extreme value, for types without minimums.

    Returns d, the integer scales and the steps they stand for. Scales are negative where the extreme is positive.
    """
    scales = _extreme(groups) / np.float32(lowest)
    d = np.abs(scales).max(axis=1) / np.float32(top_scale)
    s, step = _integers(scales, d)
    return d, s, step


def _with_minimums(
    groups: Floats, *, top_code: int, top_scale: int
) -> tuple[Floats, Floats, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    lowest = np.minimum(groups.min(axis=2), 0)
    scales = (groups.max(axis=2).clip(0) - lowest) / np.float32(top_code)
    d, m = scales.max(axis=1) / np.float32(top_scale), (-lowest).max(axis=1) / np.float32(top_scale)
    (s, step), (n, minimum) = _integers(scales, d), _integers(-lowest, m)
    return d, m, s, n, _nearest(groups + minimum, step, 0, top_code)


def _integers(scales: Floats, d: Floats) -> tuple[NDArray[np.int64], Floats]:
    """`scales` as integers times `d` in float16, and what these are, [num_blocks, groups, 1]."""
    unit = d.astype(np.float16).astype(np.float32)[:, None]
    s = np.rint(scales / np.where(unit == 0, 1, unit)).astype(np.int64)
    limit = np.rint(np.abs(scales).max(axis=1, keepdims=True) / np.where(d == 0, 1, d)[:, None]).astype(np.int64)
    s = s.clip(-limit, limit)
    return s, (unit * s.astype(np.float32))[..., None]


def _nearest(groups: Floats, steps: Floats, low: int, high: int) -> NDArray[np.int64]:
    return np.rint(groups / np.where(steps == 0, 1, steps)).clip(low, high).astype(np.int64)


def _nearest_in_codebook(groups: Floats, steps: Floats) -> NDArray[np.int64]:
    scaled = groups / np.where(steps == 0, 1, steps)
    return np.asarray(np.abs(scaled[..., None] - _CODEBOOK).argmin(axis=3), np.int64)


def _halves(values: Floats) -> Bytes:
    return values.astype("<f2").reshape(-1, 1).view(np.uint8)


def _pack_nibbles(codes: NDArray[np.int64], run: int) -> NDArray[np.int64]:
    runs = codes.reshape(len(codes), -1, 2, run)
    return runs[:, :, 0] | runs[:, :, 1] << 4


def _pack_pairs(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    halves = codes.reshape(-1, 2, 4, 32)
    return halves[:, :, 0] | halves[:, :, 1] << 2 | halves[:, :, 2] << 4 | halves[:, :, 3] << 6


def _pack_planes(bits: NDArray[np.int64]) -> Bytes:
    return np.packbits(bits.reshape(-1, 8, 32).astype(np.uint8), axis=1, bitorder="little")


def _pack_k_scales(s: NDArray[np.int64], n: NDArray[np.int64]) -> NDArray[np.int64]:
    early = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (s, n)]
    return np.concatenate([*early, s[:, 4:] & 15 | (n[:, 4:] & 15) << 4], axis=1)


def _joined(*parts: Any) -> Bytes:
    return np.concatenate([np.reshape(part, (len(part), -1)).astype(np.uint8) for part in parts], axis=1)

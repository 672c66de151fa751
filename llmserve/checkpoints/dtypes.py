"""Element types of checkpoint tensors and the bytes they take.

Invariant: a type is either in `BLOCKS`, and then every reader and executor knows it, or it is refused at opening.
"""

from __future__ import annotations

import math

BLOCKS: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "i4_g32": (32, 18),
    "i4_g64": (64, 34),
    "i4_g128": (128, 66),
    "u4_g32": (32, 20),
    "u4_g64": (64, 36),
    "u4_g128": (128, 68),
    "i8": (1, 1),
}
"""dtype → (elements of a block, bytes of a block). Blocks lie along the last axis; a row of `i8` has its scale behind.

`i4_*`, `u4_*` and `i8` are forms that readers bring other layouts into; no file holds them.
"""

ROW_BYTES = {"i8": 4}
"""What a row takes beside its blocks."""


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. `shape[-1]` must be a multiple of the block."""
    elements, size = BLOCKS[dtype]
    return math.prod(shape) // elements * size + math.prod(shape[:-1]) * ROW_BYTES.get(dtype, 0)

"""Blocks of random bytes: whatever a legal file can hold, not only what a quantizer makes."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.dtypes import BLOCKS
from llmserve.types import CheckpointTensor

HALVES: Final = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "iq4_nl": (0,), "iq4_xs": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "i4_g32": (0,), "i4_g64": (0,), "i4_g128": (0,), "u4_g32": (0, 2), "u4_g64": (0, 2), "u4_g128": (0, 2),
}  # fmt: skip
"""Where a block keeps its float16 numbers."""

_EXTREMES: Final = np.array([0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 6e-5, -1.0], np.float16)


def random_blocks(rng: np.random.Generator, dtype: str, num_blocks: int) -> NDArray[np.uint8]:
    """[num_blocks, block bytes]. All float16 are finite; one in four is an extreme one."""
    blocks = rng.integers(0, 256, (num_blocks, BLOCKS[dtype][1]), dtype=np.uint8)
    for offset in HALVES[dtype]:
        halves = rng.integers(0, 1 << 16, num_blocks, dtype=np.uint16) & 0xBBFF  # exponents of at most 14, both signs
        extreme = rng.choice(_EXTREMES, num_blocks).view(np.uint16)
        halves = np.where(rng.random(num_blocks) < 0.25, extreme, halves).astype("<u2")
        blocks[:, offset : offset + 2] = halves[:, None].view(np.uint8)
    return blocks


def random_tensor(rng: np.random.Generator, dtype: str, rows: int, columns: int) -> CheckpointTensor:
    """A matrix of such blocks, or of such bytes with normal scales."""
    if dtype == "i8":
        codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8).view(np.uint8)
        scales = rng.normal(size=(rows, 1)).astype("<f4").view(np.uint8)
        stored = np.concatenate([codes, scales], axis=1)
        return CheckpointTensor("test", dtype, (rows, columns), memoryview(stored.tobytes()))
    blocks = random_blocks(rng, dtype, rows * columns // BLOCKS[dtype][0])
    return CheckpointTensor("test", dtype, (rows, columns), memoryview(blocks.tobytes()))

"""Philox4x32-10: the counter-based random numbers of sampling, in plain Python.

Owns the definition that every executor follows. A draw is a pure function of the request's seed and of the position of
the token that is drawn, so it does not depend on the batch, the order of steps or preemption.

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (position & 0xffffffff, position >> 32, 0, 0)
    uniform = ((x0 >> 8) + 0.5) * 2**-24        with x0 the first of the four output words; 0 < uniform < 1

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from typing import Final

_MULTIPLIER_0: Final = 0xD2511F53
_MULTIPLIER_1: Final = 0xCD9E8D57
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
_MASK: Final = 0xFFFFFFFF

Words = tuple[int, int, int, int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """The ten rounds: four 32-bit words from a 128-bit counter under a 64-bit key."""
    x0, x1, x2, x3 = counter
    key_0, key_1 = key
    for _ in range(10):
        product_0 = x0 * _MULTIPLIER_0
        product_1 = x2 * _MULTIPLIER_1
        x0, x1 = (product_1 >> 32) ^ x1 ^ key_0, product_1 & _MASK
        x2, x3 = (product_0 >> 32) ^ x3 ^ key_1, product_0 & _MASK
        key_0 = (key_0 + _WEYL_0) & _MASK
        key_1 = (key_1 + _WEYL_1) & _MASK
    return x0, x1, x2, x3


def uniform(seed: int, position: int) -> float:
    """The draw for the token at `position` of the request keyed by `seed`. Both are in [0, 2**64)."""
    counter = (position & _MASK, position >> 32, 0, 0)
    word = philox4x32(counter, (seed & _MASK, seed >> 32))[0]
    return ((word >> 8) + 0.5) * 2.0**-24

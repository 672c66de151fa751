"""Arithmetic that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def bound(count):
    """An end of a `range` that is known to the GPU only."""
    if INTERPRETED:
        # A scalar of the interpreter is an array of one element, which NumPy 2.4 no longer takes for an index.
        return int(count.handle.data.item())
    return count


@triton.jit
def narrow(x):
    """float32 to bfloat16, to nearest, ties to even."""
    if INTERPRETED:
        # The interpreter cuts bits off. What is not a number stays so, whatever rounding would make of its bits.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def multiply(a, b):
    """Matrix product of bfloat16 tiles, summed in float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as its bits and would multiply those. Products of widened values are the same.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def tanh(x):
    """By the exponential, without overflow; its error is absolute, about 1e-7."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, t, -t)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """silu, gelu, gelu_tanh or relu2 of float32 values."""
    if ACT == "silu":
        y = x * sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACT == "relu2")
        positive = tl.maximum(x, 0.0)
        y = positive * positive
    return y

"""The arithmetic of the reference executor: plain functions of NumPy float32 arrays, slow and obvious.

Invariant: no function here knows of steps, caches or checkpoints. T = tokens, S = cached tokens a query may see.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmserve.ops.protocol import ActKind, AttentionSpec, NormKind, RopeSpec

Array = NDArray[np.float32]

_erf: Final = np.vectorize(math.erf, otypes=[np.float32])


def norm(x: Array, weight: Array, *, kind: NormKind, eps: float, bias: Array | None) -> Array:
    """RMS or layer norm over the last axis."""
    centered = x - x.mean(axis=-1, keepdims=True) if kind == "layer" else x
    variance = np.square(centered).mean(axis=-1, keepdims=True, dtype=np.float32)
    y = centered / np.sqrt(variance + np.float32(eps)) * weight
    return np.asarray(y if bias is None else y + bias)


def rope(x: Array, positions: NDArray[np.int32], spec: RopeSpec) -> Array:
    """Rotate the first `rotary_dim` channels of each head by the token's position. `x` is [T, heads, head_dim]."""
    angles = positions[:, None].astype(np.float64) * spec.inv_freq  # [T, rotary_dim / 2]
    cos = (np.cos(angles) * spec.attention_factor).astype(np.float32)[:, None]
    sin = (np.sin(angles) * spec.attention_factor).astype(np.float32)[:, None]
    half = spec.rotary_dim // 2
    pairs = (
        (slice(0, half), slice(half, 2 * half))
        if spec.style == "half"
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    first, second = x[..., pairs[0]], x[..., pairs[1]]
    y = x.copy()
    y[..., pairs[0]] = first * cos - second * sin
    y[..., pairs[1]] = second * cos + first * sin
    return y


def act(x: Array, kind: ActKind) -> Array:
    """The activation function itself."""
    if kind == "silu":
        return x * sigmoid(x)
    if kind == "relu2":
        return np.square(np.maximum(x, 0))
    if kind == "gelu":
        return np.asarray(x * np.float32(0.5) * (1 + _erf(x * np.float32(math.sqrt(0.5)))))
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return np.asarray(x * np.float32(0.5) * (1 + np.tanh(inner)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), by tanh so that nothing overflows."""
    return np.asarray(np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x)))


def softcap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`; no cap when it is None or 0."""
    return x if not cap else np.float32(cap) * np.tanh(x / np.float32(cap))


def softmax(x: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def visible(query_positions: NDArray[np.int32], num_keys: int, spec: AttentionSpec) -> NDArray[np.bool_]:
    """Which of the keys at positions 0 … num_keys - 1 each query sees, [T, S]."""
    distance = query_positions[:, None] - np.arange(num_keys)[None, :]
    seen = np.ones(distance.shape, np.bool_) if spec.mask == "bidirectional" else distance >= 0
    return seen & (np.abs(distance) < spec.window) if spec.window else seen


def attention(q: Array, k: Array, v: Array, seen: NDArray[np.bool_], spec: AttentionSpec, sinks: Array | None) -> Array:
    """Attend for one sequence.

    q [T, heads, D], k [S, kv_heads, D], v [S, kv_heads, Dv], seen [T, S], sinks [heads]; returns [T, heads * Dv].
    Query head h reads key-value head h // (heads / kv_heads). Every query must see at least one key.
    """
    num_tokens, group = q.shape[0], spec.heads // spec.kv_heads
    grouped = q.reshape(num_tokens, spec.kv_heads, group, -1).transpose(1, 2, 0, 3)  # [kv_heads, group, T, D]
    keys = k.transpose(1, 2, 0)[:, None]  # [kv_heads, 1, D, S]
    scores = softcap(grouped @ keys * np.float32(spec.scale), spec.softcap)
    scores = np.where(seen, scores, np.float32(-np.inf))  # [kv_heads, group, T, S]
    if sinks is not None:
        extra = np.broadcast_to(sinks.reshape(spec.kv_heads, group, 1, 1), (*scores.shape[:3], 1))
        weights = softmax(np.concatenate([scores, extra], axis=-1))[..., :-1]
    else:
        weights = softmax(scores)
    mixed = weights @ v.transpose(1, 0, 2)[:, None]  # [kv_heads, group, T, Dv]
    return np.ascontiguousarray(mixed.transpose(2, 0, 1, 3)).reshape(num_tokens, -1)

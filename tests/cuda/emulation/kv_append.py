"""Norm of heads, rotation, and the cache, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.kv_append import HeadNorm, Rotation, check_arguments
from llmserve.ops.cuda.kv_cache import LARGEST, KvCache

TINY = 1e-35


def kv_append(
    qkv: Tensor,
    q_out: Tensor,
    cache: KvCache,
    positions: Tensor,
    slots: Tensor,
    *,
    rotation: Rotation | None = None,
    norm: HeadNorm | None = None,
) -> None:
    check_arguments(qkv, q_out, cache, positions, slots, rotation, norm)
    tokens, head_dim, kv_heads = len(qkv), cache.head_dim, cache.kv_heads
    heads = q_out.shape[1] // head_dim
    q, k, v = qkv.float().reshape(tokens, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if norm is not None:
        q, k = _normed(q, norm.q, norm.eps), _normed(k, norm.k, norm.eps)
    if rotation is not None:
        q, k = (_rotated(x, rotation, positions.long()) for x in (q, k))
    q_out.copy_(q.flatten(1).to(q_out.dtype))
    written = slots >= 0
    blocks, offsets = slots[written] // cache.block_size, slots[written] % cache.block_size
    for x, values, scales in ((k, cache.k, cache.k_scales), (v, cache.v, cache.v_scales)):
        _write(x[written], values, scales, blocks, offsets)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    half = rotation.table.shape[1]
    cos, sin = (rotation.table[positions][:, None, :, i] for i in (0, 1))
    out = x.clone()
    if rotation.style == "half":
        left, right = x[..., :half], x[..., half : 2 * half]
        out[..., :half], out[..., half : 2 * half] = left * cos - right * sin, right * cos + left * sin
    else:
        left, right = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = left * cos - right * sin, right * cos + left * sin
    return out


def _write(x: Tensor, values: Tensor, scales: Tensor | None, blocks: Tensor, offsets: Tensor) -> None:
    if scales is not None:
        largest = x.abs().amax(-1)
        inverse = torch.where(largest < TINY, 0.0, LARGEST[values.dtype] / largest)
        scales[blocks, :, offsets] = torch.where(largest < TINY, 0.0, largest / LARGEST[values.dtype])
        x = x * inverse[..., None]
        x = x.round().clamp(-127, 127) if values.dtype == torch.int8 else x.clamp(-448, 448)
    values.view(torch.uint8 if values.element_size() == 1 else torch.int16)[blocks, :, offsets] = x.to(
        values.dtype
    ).view(torch.uint8 if values.element_size() == 1 else torch.int16)

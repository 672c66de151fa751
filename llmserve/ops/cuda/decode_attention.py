"""Attention of one query per sequence over the paged cache (`csrc/cuda/decode_attention.cu`), and its work."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve.ops.cuda.kv_cache import CacheFields, KvCache, cache_fields, check_aligned, check_cache
from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer

TILE_TOKENS: Final = 64
_BF16: Final = (torch.bfloat16,)
_F32: Final = (torch.float32,)
_I32: Final = (torch.int32,)


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """What scores become before they are exponents."""

    scale: float
    softcap: float = 0.0
    """Zero, or scores are `softcap * tanh(scale * product / softcap)`."""
    window: int = 0
    """A query at i sees j with i - j < window; zero: all."""
    sinks: Tensor | None = None
    """float32 [heads], scores of a key without a value; None: none."""


@dataclass(frozen=True, slots=True)
class SplitWork:
    """`plan_work` on the device, in buffers that may be larger than what they hold."""

    work: Tensor  # int32 [max_work, 2]
    extent: Tensor  # int32 [2]: how much work there is, and the tokens of a split, a multiple of 64
    partial_start: Tensor  # int32 [sequences]


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """States of splits, of as many as there may be work."""

    out: Tensor  # float32 [max_work, heads, head_dim]
    state: Tensor  # float32 [max_work, heads, 2]


class DecodeAttention(Protocol):
    """The launcher."""

    def __call__(
        self,
        q: Tensor,
        out: Tensor,
        cache: KvCache,
        block_tables: Tensor,
        seq_lens: Tensor,
        split: SplitWork,
        workspace: SplitWorkspace,
        rule: AttentionRule,
        *,
        num_ctas: int,
    ) -> None:
        """Softmax of the scores of each query, times the values.

        q and out are bfloat16 [sequences, heads, head_dim], dense but for the first dimension, whose steps are whole
        16 bytes; the cache already has the query's own key, the last of the seq_lens (int32 [sequences]) tokens. Where
        that is zero, out is zeros. block_tables is int32 [sequences, any] with dense rows; entries of blocks
        without visible tokens may be anything. `num_ctas` blocks go through the work; results do not depend on it, and
        a row's not on the other sequences. Raises `ValueError`.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("cache", CacheFields),
        ("block_tables", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        ("extent", ctypes.c_void_p),
        ("partial_start", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("partial_out", ctypes.c_void_p),
        ("partial_state", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("num_ctas", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def launcher(library: CudaLibrary) -> DecodeAttention:
    """The compiled kernels."""

    def decode_attention(
        q: Tensor,
        out: Tensor,
        cache: KvCache,
        block_tables: Tensor,
        seq_lens: Tensor,
        split: SplitWork,
        workspace: SplitWorkspace,
        rule: AttentionRule,
        *,
        num_ctas: int,
    ) -> None:
        check_arguments(q, out, cache, block_tables, seq_lens, split, workspace, rule, num_ctas)
        arguments = _Args(
            q=pointer(q),
            out=pointer(out),
            cache=cache_fields(cache),
            block_tables=pointer(block_tables),
            seq_lens=pointer(seq_lens),
            work=pointer(split.work),
            extent=pointer(split.extent),
            partial_start=pointer(split.partial_start),
            sinks=pointer(rule.sinks),
            partial_out=pointer(workspace.out),
            partial_state=pointer(workspace.state),
            sequences=q.shape[0],
            heads=q.shape[1],
            q_stride=q.stride(0),
            out_stride=out.stride(0),
            table_stride=block_tables.stride(0),
            window=rule.window,
            num_ctas=num_ctas,
            scale=rule.scale,
            softcap=rule.softcap,
        )
        library.call("decode_attention", arguments)

    return decode_attention


def check_queries(q: Tensor, out: Tensor, cache: KvCache, rule: AttentionRule) -> None:
    """What both kinds of attention ask of queries, cache and rule. Raises `ValueError`."""
    check_cache(cache)
    if q.ndim != 3 or q.shape[1] == 0 or q.shape[1] % cache.kv_heads != 0:
        raise ValueError(f"q: shape {tuple(q.shape)} is not heads for {cache.kv_heads} of keys and values")
    for name, tensor in (("q", q), ("out", out)):
        check(name, tensor, dtypes=_BF16, shape=(*q.shape[:2], cache.head_dim))
        if tensor.stride(1) != cache.head_dim and tensor.shape[1] > 1:
            raise ValueError(f"{name}: its heads are not dense")
    check_aligned(q=q, out=out)
    if rule.window < 0 or rule.softcap < 0:
        raise ValueError(f"rule: negative window {rule.window} or softcap {rule.softcap}")
    if rule.sinks is not None:
        check_dense("sinks", rule.sinks, dtypes=_F32, shape=(q.shape[1],))


def check_arguments(
    q: Tensor,
    out: Tensor,
    cache: KvCache,
    block_tables: Tensor,
    seq_lens: Tensor,
    split: SplitWork,
    workspace: SplitWorkspace,
    rule: AttentionRule,
    num_ctas: int,
) -> None:
    """Raises `ValueError` naming the argument that the kernels could not take."""
    check_queries(q, out, cache, rule)
    sequences, heads = q.shape[:2]
    check("block_tables", block_tables, dtypes=_I32, shape=(sequences, *block_tables.shape[1:2]))
    check_dense("seq_lens", seq_lens, dtypes=_I32, shape=(sequences,))
    check_dense("work", split.work, dtypes=_I32, shape=(*split.work.shape[:1], 2))
    check_dense("extent", split.extent, dtypes=_I32, shape=(2,))
    check_dense("partial_start", split.partial_start, dtypes=_I32, shape=(sequences,))
    if num_ctas <= 0:
        raise ValueError(f"num_ctas: {num_ctas}")
    max_work = split.work.shape[0]
    check_dense("workspace.out", workspace.out, dtypes=_F32, shape=(max_work, heads, cache.head_dim))
    check_dense("workspace.state", workspace.state, dtypes=_F32, shape=(max_work, heads, 2))
    check_device(
        q=q, out=out, k_cache=cache.k, v_cache=cache.v, k_scales=cache.k_scales, v_scales=cache.v_scales,
        block_tables=block_tables, seq_lens=seq_lens, work=split.work, extent=split.extent,
        partial_start=split.partial_start, workspace_out=workspace.out, workspace_state=workspace.state,
        sinks=rule.sinks,
    )  # fmt: skip


def ctas_per_sm(cache: KvCache) -> int:
    """How many blocks of the kernel an SM of compute capability 9.0 holds: `num_ctas` is that times the SMs."""
    of_width = {2: (3, 2, 1), 1: (5, 3, 2)}[cache.k.element_size()]
    return of_width[0 if cache.head_dim <= 64 else 1 if cache.head_dim <= 128 else 2]


def plan_work(
    seq_lens: NDArray[Any], *, split_tokens: int, window: int, max_work: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Which splits there are, and where each sequence's first is among them.

    Returns (int32 [num_work, 2] of sequence and split, int32 [sequences]). Splits of a sequence follow each other; with
    a window those before it are left out. Raises `ValueError` where there are more than `max_work`, or splits
    are not whole tiles.
    """
    if split_tokens <= 0 or split_tokens % TILE_TOKENS != 0:
        raise ValueError(f"split_tokens: {split_tokens} is not a multiple of {TILE_TOKENS}")
    lens = np.asarray(seq_lens, np.int64)
    first = np.maximum(lens - window, 0) // split_tokens if window else np.zeros_like(lens)
    counts = -(-lens // split_tokens) - first
    start = np.cumsum(counts) - counts
    num_work = int(counts.sum())
    if num_work > max_work:
        raise ValueError(f"max_work: {num_work} splits, room for {max_work}")
    sequence = np.repeat(np.arange(len(lens)), counts)
    split = np.arange(num_work) - np.repeat(start - first, counts)
    return np.stack([sequence, split], axis=1).astype(np.int32), start.astype(np.int32)


def choose_split(seq_lens: NDArray[Any], kv_heads: int, num_sms: int, *, waves: int = 2) -> int:
    """The largest split, a power of two times 64 tokens, that still gives every SM `waves` items; 64 at least."""
    lens = np.asarray(seq_lens, np.int64)
    longest = max(int(lens.max(initial=0)), TILE_TOKENS)
    sizes = TILE_TOKENS << np.arange((-(-longest // TILE_TOKENS) - 1).bit_length() + 1)
    items = (-(-lens[None, :] // sizes[:, None])).sum(1) * kv_heads
    enough = np.flatnonzero(items >= waves * num_sms)
    return int(sizes[enough[-1]]) if len(enough) else TILE_TOKENS

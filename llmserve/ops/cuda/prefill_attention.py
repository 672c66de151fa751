"""Attention of a chunk of each sequence's tokens over the paged cache (`csrc/cuda/prefill_attention.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve.ops.cuda.decode_attention import TILE_TOKENS, AttentionRule, check_queries
from llmserve.ops.cuda.kv_cache import CacheFields, KvCache, cache_fields
from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer

_I32: Final = (torch.int32,)


@dataclass(frozen=True, slots=True)
class QueryWork:
    """`plan_query_tiles` on the device, in buffers that may be larger than what they hold."""

    work: Tensor  # int32 [max_work, 2]
    num_work: Tensor  # int32 [1]


class PrefillAttention(Protocol):
    """The launcher."""

    def __call__(
        self,
        q: Tensor,
        out: Tensor,
        cache: KvCache,
        block_tables: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        queries: QueryWork,
        rule: AttentionRule,
        *,
        num_ctas: int,
        fold_tokens: int = 0,
        is_bidirectional: bool = False,
    ) -> None:
        """Softmax of the scores of each query, times the values.

        q and out are bfloat16 [tokens, heads, head_dim], dense but for the first dimension, whose steps are whole 16
        bytes. Rows query_start[s] to query_start[s + 1] are the last of the seq_lens[s] tokens of sequence s, whose
        keys the cache already has; query_start is int32 [sequences + 1], seq_lens int32 [sequences]. Rows of no
        sequence are left as they are. block_tables is int32 [sequences, any] with dense rows; entries of blocks without
        visible tokens may be anything. A query sees the tokens up to its own, or all where `is_bidirectional`; with a
        window those nearer than it. Results depend neither on `num_ctas` nor on the other sequences; with `fold_tokens`
        (a multiple of 64) they are to the bit those of decode attention with that `split_tokens`. Raises `ValueError`.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("cache", CacheFields),
        ("block_tables", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        ("num_work", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("fold_tokens", ctypes.c_int64),
        ("num_ctas", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("is_bidirectional", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> PrefillAttention:
    """The compiled kernel."""

    def prefill_attention(
        q: Tensor,
        out: Tensor,
        cache: KvCache,
        block_tables: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        queries: QueryWork,
        rule: AttentionRule,
        *,
        num_ctas: int,
        fold_tokens: int = 0,
        is_bidirectional: bool = False,
    ) -> None:
        check_arguments(q, out, cache, block_tables, query_start, seq_lens, queries, rule, num_ctas, fold_tokens)
        arguments = _Args(
            q=pointer(q),
            out=pointer(out),
            cache=cache_fields(cache),
            block_tables=pointer(block_tables),
            query_start=pointer(query_start),
            seq_lens=pointer(seq_lens),
            work=pointer(queries.work),
            num_work=pointer(queries.num_work),
            sinks=pointer(rule.sinks),
            heads=q.shape[1],
            q_stride=q.stride(0),
            out_stride=out.stride(0),
            table_stride=block_tables.stride(0),
            window=rule.window,
            fold_tokens=fold_tokens,
            num_ctas=num_ctas,
            scale=rule.scale,
            softcap=rule.softcap,
            is_bidirectional=is_bidirectional,
        )
        library.call("prefill_attention", arguments)

    return prefill_attention


def check_arguments(
    q: Tensor,
    out: Tensor,
    cache: KvCache,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    queries: QueryWork,
    rule: AttentionRule,
    num_ctas: int,
    fold_tokens: int,
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    check_queries(q, out, cache, rule)
    sequences = seq_lens.shape[0]
    check_dense("seq_lens", seq_lens, dtypes=_I32, shape=(sequences,))
    check_dense("query_start", query_start, dtypes=_I32, shape=(sequences + 1,))
    check("block_tables", block_tables, dtypes=_I32, shape=(sequences, *block_tables.shape[1:2]))
    check_dense("work", queries.work, dtypes=_I32, shape=(*queries.work.shape[:1], 2))
    check_dense("num_work", queries.num_work, dtypes=_I32, shape=(1,))
    if fold_tokens < 0 or fold_tokens % TILE_TOKENS != 0:
        raise ValueError(f"fold_tokens: {fold_tokens} is not a multiple of {TILE_TOKENS}")
    if num_ctas <= 0:
        raise ValueError(f"num_ctas: {num_ctas}")
    check_device(
        q=q, out=out, k_cache=cache.k, v_cache=cache.v, k_scales=cache.k_scales, v_scales=cache.v_scales,
        block_tables=block_tables, query_start=query_start, seq_lens=seq_lens, work=queries.work,
        num_work=queries.num_work, sinks=rule.sinks,
    )  # fmt: skip


def ctas_per_sm(cache: KvCache, fold_tokens: int) -> int:
    """How many blocks of the kernel an SM of compute capability 9.0 holds: `num_ctas` is that times the SMs."""
    if cache.k.element_size() == 1 or cache.head_dim > 128:
        return 1
    return 1 if fold_tokens and cache.head_dim > 64 else 2


def query_rows(head_dim: int) -> int:
    """Rows of a tile of queries (`kRows` of the kernel): a row is a token and one of the heads of a key-value head."""
    return 128 if head_dim <= 128 else 64


def plan_query_tiles(
    query_start: NDArray[Any], seq_lens: NDArray[Any], *, group: int, head_dim: int, max_work: int
) -> NDArray[np.int32]:
    """Tiles of queries, int32 [num_work, 2] of sequence and tile, those that see most tokens first.

    `group` is heads / kv_heads. Raises `ValueError` where there are more than `max_work`.
    """
    start, rows = np.asarray(query_start, np.int64), query_rows(head_dim)
    lens, queries = np.asarray(seq_lens, np.int64), np.diff(start)
    counts = -(-queries * group // rows)
    num_work = int(counts.sum())
    if num_work > max_work:
        raise ValueError(f"max_work: {num_work} tiles, room for {max_work}")
    sequence = np.repeat(np.arange(len(lens)), counts)
    tile = np.arange(num_work) - np.repeat(np.cumsum(counts) - counts, counts)
    last = np.minimum(((tile + 1) * rows - 1) // group, queries[sequence] - 1)
    order = np.argsort(queries[sequence] - last - lens[sequence], kind="stable")
    return np.stack([sequence, tile], axis=1)[order].astype(np.int32)

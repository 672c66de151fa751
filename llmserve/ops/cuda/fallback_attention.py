"""Attention over the paged cache in Triton, for heads that the CUDA kernels do not take.

Any number of channels, and other numbers for values than for keys (MLA keeps 576 and 512). One program passes over all
keys of its queries, so a single long sequence keeps few SMs busy: right everywhere, fast for batches alone.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
from torch import Tensor

from llmserve.ops.cuda.library import check, check_dense, check_device
from llmserve.ops.cuda.triton_kernels.attention import paged_attention_kernel

_MAX_V_DIM: Final = 512
"""More channels of values would not fit into the registers of one program."""


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> None:
    """Attend for all sequences of a step; the step's keys and values are in the cache already.

    q [T, heads, D] and out [T, heads, Dv] are bfloat16; so are the caches, [num_blocks, kv_heads, block_size, D | Dv].
    block_tables [S, max_blocks], seq_lens [S] (with the step's tokens) and query_start [S + 1] are int32. Query i of
    the n of its sequence stands at seq_len - n + i. Options are those of `AttentionSpec`; sinks are float32, [heads].
    Rows from query_start[S] on are left alone. A query that sees nothing gives 0. Raises `ValueError` naming what is
    wrong.
    """
    check_arguments(q, k_cache, v_cache, out, block_tables, seq_lens, query_start, sinks)
    tokens, heads, head_dim = q.shape
    kv_heads, block_size, v_dim = v_cache.shape[1:]
    sequences = len(seq_lens)
    if tokens == 0 or sequences == 0:
        return
    constants = _constants(tokens, sequences, heads // kv_heads, head_dim, v_dim)
    num_tiles = tokens // (constants["ROWS"] // constants["HEADS"]) + sequences
    head_tiles = math.ceil(constants["GROUP"] / constants["HEADS"])
    paged_attention_kernel[(num_tiles, kv_heads, head_tiles)](
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start,
        sinks,
        out,
        float(scale),
        float(softcap),
        sequences,
        block_tables.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *out.stride()[:2],
        BLOCK_SIZE=block_size,
        CAUSAL=causal,
        WINDOW=window,
        SOFTCAP=softcap != 0.0,
        **constants,
    )


def _constants(tokens: int, sequences: int, group: int, head_dim: int, v_dim: int) -> dict[str, int]:
    """The tiles that shapes lead to: registers bound rows times channels of values, shared memory keys times both."""
    # Heads whose rows do not start at multiples of 16 channels are read value by value, each address in a register.
    aligned = head_dim % 16 == 0 and v_dim % 16 == 0
    rows = 16 if v_dim > 256 and not aligned else _rows(tokens, sequences, group, v_dim)
    return {
        "GROUP": group,
        # Heads of one group stand in one tile as far as it reaches; the rest go to tiles of their own.
        "HEADS": min(group, rows),
        "HEAD_DIM": head_dim,
        "V_DIM": v_dim,
        "PADDED_V_DIM": max(16, triton.next_power_of_2(v_dim)),
        "PADDED_SEQUENCES": triton.next_power_of_2(sequences),
        "ROWS": rows,
        "KEYS": 32 if aligned and rows * v_dim < 32 * 512 else 16,
        "BLOCK_D": min(128, max(16, triton.next_power_of_2(head_dim))),
        "num_warps": 4 if rows == 16 and v_dim <= 256 else 8,
        "num_stages": 2,
    }


def _rows(tokens: int, sequences: int, group: int, v_dim: int) -> int:
    """Rows of a tile: 16, the least that tensor cores take, for decoding; more where each sequence has many queries."""
    if tokens * group <= 16 * sequences:
        return 16
    return 32 if v_dim > 256 else 64


def check_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    sinks: Tensor | None,
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    tokens, heads, head_dim = q.shape
    blocks, kv_heads, block_size, v_dim = v_cache.shape
    bf16, int32 = (torch.bfloat16,), (torch.int32,)
    check("q", q, dtypes=bf16, shape=(tokens, heads, head_dim))
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q: {heads} heads, no multiple of the cache's {kv_heads}")
    check("k_cache", k_cache, dtypes=bf16, shape=(blocks, kv_heads, block_size, head_dim))
    check("v_cache", v_cache, dtypes=bf16, shape=(blocks, kv_heads, block_size, v_dim))
    if v_dim > _MAX_V_DIM:
        raise ValueError(f"v_cache: {v_dim} channels, at most {_MAX_V_DIM}")
    check("out", out, dtypes=bf16, shape=(tokens, heads, v_dim))
    check("block_tables", block_tables, dtypes=int32, shape=tuple(block_tables.shape))
    check_dense("seq_lens", seq_lens, dtypes=int32, shape=block_tables.shape[:1])
    check_dense("query_start", query_start, dtypes=int32, shape=(len(seq_lens) + 1,))
    if sinks is not None:
        check_dense("sinks", sinks, dtypes=(torch.float32,), shape=(heads,))
    check_device(q=q, k_cache=k_cache, v_cache=v_cache, out=out, block_tables=block_tables, seq_lens=seq_lens)

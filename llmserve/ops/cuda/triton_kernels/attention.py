"""Attention over the paged cache for every size of head, in one pass over the keys.

A program has ROWS rows; a row is one query with one head. With HEADS query heads of one key-value head in a tile:

    row       0         1       …   HEADS - 1     HEADS     …
    query   first     first     …    first      first + 1   …
    head      0         1       …   HEADS - 1       0       …

Query i of a sequence of n queries stands at position seq_len - n + i.
Grid: (tiles of queries, kv_heads, tiles of heads).
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmserve.ops.cuda.triton_kernels.common import bound, multiply, narrow, tanh


@triton.jit
def _sequence_of_tile(tile, query_start, num_sequences, TOKENS: tl.constexpr, PADDED_SEQUENCES: tl.constexpr):
    """(sequence, tile within it) of a tile of TOKENS queries.

    Sequence s begins at tile query_start[s] // TOKENS + s: never before the end of the one before it, and found without
    a sum over the sequences. Between them are tiles without queries.
    """
    sequence = tl.arange(0, PADDED_SEQUENCES)
    there = sequence < num_sequences
    first = tl.load(query_start + sequence, mask=there, other=0) // TOKENS + sequence
    found = tl.sum((there & (first <= tile)).to(tl.int32), axis=0) - 1
    return found, tile - tl.sum(tl.where(sequence == found, first, 0), axis=0)


@triton.jit
def _scores(
    q,
    k,
    rows_valid,
    keys_valid,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[ROWS, KEYS] products of rows and keys, given the addresses of their first channels."""
    scores = tl.zeros((ROWS, KEYS), tl.float32)
    for start in tl.static_range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = (channel < HEAD_DIM)[None, :]
        q_part = tl.load(q[:, None] + channel[None, :], mask=rows_valid[:, None] & inside, other=0.0)
        k_part = tl.load(k[:, None] + channel[None, :], mask=keys_valid[:, None] & inside, other=0.0)
        scores += multiply(q_part, tl.trans(k_part))
    return scores


@triton.jit
def _keys_of_tile(first, last, seq_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """Begin, a multiple of KEYS, and end of the keys that queries at positions first … last may see."""
    begin = 0
    end = seq_len
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
        end = tl.minimum(seq_len, last + WINDOW)
    if CAUSAL:
        end = last + 1
    return begin, end


@triton.jit
def _hide(scores, position, key, keys_valid, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Scores, with -inf for keys that a row does not see."""
    distance = position[:, None] - key[None, :]
    seen = keys_valid[None, :]
    if CAUSAL:
        seen = seen & (distance >= 0)
    if WINDOW > 0:
        seen = seen & (distance < WINDOW) & (distance > -WINDOW)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _weigh(scores, highest, total):
    """One step of the softmax in one pass: (weights, factor of the sums so far, new maximum, new total)."""
    lowest = float("-inf")
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    # A row that has seen no key yet has no maximum; 0 in its place gives weights of 0.
    safe = tl.where(new_highest == lowest, 0.0, new_highest)
    weights = tl.exp(scores - safe[:, None])
    rescale = tl.exp(highest - safe)
    return weights, rescale, new_highest, total * rescale + tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def paged_attention_kernel(
    q, k_cache, v_cache, block_tables, seq_lens, query_start, sinks, out, scale, softcap, num_sequences, table_stride,
    q_token_stride, q_head_stride, k_block_stride, k_head_stride, k_slot_stride, v_block_stride, v_head_stride,
    v_slot_stride, out_token_stride, out_head_stride, GROUP: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_SEQUENCES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of TOKENS queries of one sequence, with HEADS of the query heads that read one key-value head."""
    TOKENS: tl.constexpr = ROWS // HEADS
    sequence, tile = _sequence_of_tile(tl.program_id(0), query_start, num_sequences, TOKENS, PADDED_SEQUENCES)
    kv_head = tl.program_id(1)
    begin = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - begin
    if tile * TOKENS >= num_queries:
        return
    seq_len = tl.load(seq_lens + sequence)
    row = tl.arange(0, ROWS)
    query = tile * TOKENS + row // HEADS
    member = tl.program_id(2) * HEADS + row % HEADS
    rows_valid = (row < TOKENS * HEADS) & (query < num_queries) & (member < GROUP)
    head = kv_head * GROUP + member
    token = (begin + query).to(tl.int64)
    position = seq_len - num_queries + query
    q += token * q_token_stride + head * q_head_stride

    if sinks is not None:
        highest = tl.load(sinks + head, mask=rows_valid, other=0.0)
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, PADDED_V_DIM), tl.float32)
    channel = tl.arange(0, PADDED_V_DIM)
    first = seq_len - num_queries + tile * TOKENS
    last = tl.minimum(first + TOKENS, seq_len) - 1
    begin_key, end_key = _keys_of_tile(first, last, seq_len, CAUSAL, WINDOW, KEYS)
    block_tables += sequence.to(tl.int64) * table_stride
    for start in range(bound(begin_key), bound(end_key), KEYS):
        key = start + tl.arange(0, KEYS)
        keys_valid = key < end_key
        block = tl.load(block_tables + key // BLOCK_SIZE, mask=keys_valid, other=0).to(tl.int64)
        slot = key % BLOCK_SIZE
        k = k_cache + block * k_block_stride + kv_head * k_head_stride + slot * k_slot_stride
        scores = _scores(q, k, rows_valid, keys_valid, HEAD_DIM, ROWS, KEYS, BLOCK_D) * scale
        if SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = _hide(scores, position, key, keys_valid, CAUSAL, WINDOW)
        weights, rescale, highest, total = _weigh(scores, highest, total)
        v = v_cache + block * v_block_stride + kv_head * v_head_stride + slot * v_slot_stride
        there = keys_valid[:, None] & (channel < V_DIM)[None, :]
        values = tl.load(v[:, None] + channel[None, :], mask=there, other=0.0)
        mixed = mixed * rescale[:, None] + multiply(narrow(weights), values)

    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    out += token * out_token_stride + head * out_head_stride
    there = rows_valid[:, None] & (channel < V_DIM)[None, :]
    tl.store(out[:, None] + channel[None, :], narrow(mixed), mask=there)

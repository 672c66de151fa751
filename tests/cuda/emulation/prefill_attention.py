"""Prefill attention in torch: sequence by sequence; folded, the same sums as decode attention."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.decode_attention import AttentionRule
from llmserve.ops.cuda.kv_cache import KvCache
from llmserve.ops.cuda.prefill_attention import QueryWork, check_arguments, query_rows
from tests.cuda.emulation.attention import attend, empty_state, gather, merge, normalized, operand_of


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
    group, rows = q.shape[1] // cache.kv_heads, query_rows(cache.head_dim)
    for sequence, tile in queries.work[: int(queries.num_work)].tolist():
        start, end = query_start[sequence : sequence + 2].tolist()
        seq_len = int(seq_lens[sequence])
        of_tile = torch.arange(tile * rows, min((tile + 1) * rows, (end - start) * group))
        for token in (of_tile // group).unique().tolist():
            position = seq_len - (end - start) + token
            first = max(0, position - rule.window + 1) if rule.window else 0
            last = position + 1
            if is_bidirectional:
                last = min(seq_len, position + rule.window) if rule.window else seq_len
            heads = of_tile[of_tile // group == token] % group
            for head in range(cache.kv_heads):
                own = heads + head * group
                x, size = q[start + token, own].float(), fold_tokens or seq_len
                state = empty_state(len(own), cache.head_dim)
                for part in range(first // size, -(-last // size)):
                    span = max(first, part * size), min(last, (part + 1) * size)
                    k, v = gather(cache, block_tables[sequence], *span, head)
                    # Whatever rows there are, each is multiplied as one of as many: else its bits depend on the tile.
                    padded = torch.zeros(group, cache.head_dim)
                    padded[heads] = x
                    seen = torch.ones((group, len(k)), dtype=torch.bool)
                    new = attend(padded, k, v, seen, rule, operand_of(cache))
                    new.maximum, new.total, new.out = new.maximum[heads], new.total[heads], new.out[heads]
                    state = merge(state, new)
                sinks = None if rule.sinks is None else rule.sinks[own]
                out[start + token, own] = normalized(state, sinks).to(out.dtype)

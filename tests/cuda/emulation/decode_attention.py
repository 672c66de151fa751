"""Decode attention in torch: split by split, merged in order."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.decode_attention import AttentionRule, SplitWork, SplitWorkspace, check_arguments
from llmserve.ops.cuda.kv_cache import KvCache
from tests.cuda.emulation.attention import attend, empty_state, gather, merge, normalized, operand_of


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
    group = q.shape[1] // cache.kv_heads
    num_work, size = split.extent.tolist()
    splits = split.work[:num_work].tolist()
    for index, seq_len in enumerate(seq_lens.tolist()):
        visible = max(0, seq_len - rule.window) if rule.window else 0
        own = [number for sequence, number in splits if sequence == index]
        for head in range(cache.kv_heads):
            rows = slice(head * group, (head + 1) * group)
            state = empty_state(group, cache.head_dim)
            for number in own:
                first, end = number * size, min((number + 1) * size, seq_len)
                k, v = gather(cache, block_tables[index], max(first, visible), end, head)
                seen = torch.ones((group, len(k)), dtype=torch.bool)
                state = merge(state, attend(q[index, rows].float(), k, v, seen, rule, operand_of(cache)))
            out[index, rows] = normalized(state, None if rule.sinks is None else rule.sinks[rows]).to(out.dtype)

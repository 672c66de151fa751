"""What both kinds of attention share in torch: the visible tokens of a sequence, and states of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmserve.ops.cuda.decode_attention import AttentionRule
from llmserve.ops.cuda.kv_cache import KvCache


@dataclass(slots=True)
class State:
    """Of rows over a range of keys: largest score, sum of probabilities, their product with the values."""

    maximum: Tensor  # [rows]
    total: Tensor  # [rows]
    out: Tensor  # [rows, head_dim]


def empty_state(rows: int, head_dim: int) -> State:
    """Of no keys."""
    return State(torch.full((rows,), -math.inf), torch.zeros(rows), torch.zeros(rows, head_dim))


def gather(cache: KvCache, table: Tensor, first: int, end: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens first to end, float32 [end - first, head_dim]."""
    tokens = torch.arange(first, end)
    blocks, offsets = table[tokens // cache.block_size].long(), tokens % cache.block_size
    k, v = (x[blocks, head, offsets].float() for x in (cache.k, cache.v))
    if cache.k_scales is not None and cache.v_scales is not None:
        k = k * cache.k_scales[blocks, head, offsets, None]
        v = v * cache.v_scales[blocks, head, offsets, None]
    return k, v


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, rule: AttentionRule, operand: torch.dtype) -> State:
    """q float32 [rows, head_dim], seen [rows, keys]; probabilities are rounded to `operand`, as the kernels do."""
    scores = q @ k.T * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    maximum = scores.amax(1)
    weights = torch.exp(scores - torch.where(maximum.isinf(), 0.0, maximum)[:, None]).to(operand).float()
    return State(maximum, weights.sum(1), weights @ v)


def merge(left: State, right: State) -> State:
    """Both ranges of keys."""
    maximum = torch.maximum(left.maximum, right.maximum)
    finite = torch.where(maximum.isinf(), 0.0, maximum)
    a, b = torch.exp(left.maximum - finite), torch.exp(right.maximum - finite)
    out = left.out * a[:, None] + right.out * b[:, None]
    return State(maximum, left.total * a + right.total * b, out)


def normalized(state: State, sinks: Tensor | None) -> Tensor:
    """The output of rows; `sinks` [rows]. Rows that see nothing are zeros."""
    finite = torch.where(state.maximum.isinf(), 0.0, state.maximum)
    total = state.total if sinks is None else state.total + torch.exp(sinks - finite)
    return torch.where(total[:, None] == 0, 0.0, state.out / total[:, None])


def operand_of(cache: KvCache) -> torch.dtype:
    """What probabilities are rounded to."""
    return torch.float16 if cache.k.dtype == torch.float16 else torch.bfloat16

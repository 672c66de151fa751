"""Paged caches for tests of attention, and attention over them in float64 with a bound for what rounding may change.

Whatever is not a visible token is poison: other slots are NaN, other entries of the block tables are no blocks at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from numpy.random import Generator
    from torch import Tensor, device, dtype

    from llmserve.ops.cuda.decode_attention import AttentionRule
    from llmserve.ops.cuda.kv_cache import KvCache

TYPES: Final = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
EDGES: Final = (1, 15, 16, 17, 63, 64, 65, 256, 257, 300)
NO_BLOCKS: Final = (2**30, -(2**30), -1)
HALF_UNIT: Final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DEVIATIONS: Final = 5.0
"""Roundings of probabilities are independent and of mean zero: their sum is beyond `x` times the root of the sum of
their squared largest sizes with a probability below 2 exp(-x^2 / 2) (Hoeffding), and as they are about uniform, far
below it."""


@dataclass(slots=True)
class Sequence:
    """What the cache holds of one, in float64 as it is read back."""

    k: Tensor  # [tokens, kv_heads, head_dim]
    v: Tensor


@dataclass(slots=True)
class Paged:
    """A cache and its tables."""

    cache: KvCache
    tables: Tensor
    seq_lens: Tensor
    sequences: list[Sequence]


def paged(
    random: Generator,
    on: device,
    kind: dtype,
    seq_lens: list[int],
    *,
    kv_heads: int = 2,
    head_dim: int = 64,
    first_visible: list[int] | None = None,
    block_size: int | None = None,
) -> Paged:
    """Random tokens in blocks of random places. Those before `first_visible` are poison too."""
    from llmserve.ops.cuda.kv_cache import KvCache

    size = block_size or int(random.choice([8, 16, 32, 128]))
    counts = [-(-length // size) for length in seq_lens]
    num_blocks = sum(counts) + 3
    order = random.permutation(num_blocks)
    width = max([*counts, 1]) + 2
    tables = random.choice(NO_BLOCKS, (len(seq_lens), width)).astype(np.int32)
    shape = (num_blocks, kv_heads, size, head_dim)
    k, v = (torch.full(shape, float("nan")).to(kind) for _ in "kv")
    if kind == torch.int8:
        k.fill_(127), v.fill_(-127)
    scales = [torch.full(shape[:3], float("nan")) if kind.itemsize == 1 else None for _ in "kv"]
    sequences = []
    for index, length in enumerate(seq_lens):
        first = 0 if first_visible is None else first_visible[index]
        own, order = order[: counts[index]], order[counts[index] :]
        kept = np.arange(counts[index]) >= first // size
        tables[index, : counts[index]][kept] = own[kept]
        tokens = np.arange(first, length)
        at = (torch.from_numpy(own[tokens // size]).long(), slice(None), torch.from_numpy(tokens % size))
        read = []
        for values, scale in ((k, scales[0]), (v, scales[1])):
            spread = random.uniform(0.3, 2.0, (1, kv_heads, 1))
            x = torch.from_numpy(random.standard_normal((len(tokens), kv_heads, head_dim)) * spread)
            whole = torch.full((length, kv_heads, head_dim), float("nan"), dtype=torch.float64)
            whole[first:] = write(x, values, scale, at)
            read.append(whole.to(on))
        sequences.append(Sequence(*read))
    memory = torch.full((len(seq_lens), width + 5), 2**30, dtype=torch.int32, device=on)
    memory[:, :width] = torch.from_numpy(tables)
    cache = KvCache(k.to(on), v.to(on), *(None if scale is None else scale.to(on) for scale in scales))
    return Paged(cache, memory[:, :width], torch.tensor(seq_lens, dtype=torch.int32, device=on), sequences)


def write(x: Tensor, values: Tensor, scales: Tensor | None, at: tuple[Tensor, slice, Tensor]) -> Tensor:
    """To the slots `at`; returns what a reader gets, float64."""
    if scales is None:
        rounded = x.to(values.dtype)
        values[at] = rounded
        return rounded.double()
    largest = 127.0 if values.dtype == torch.int8 else 448.0
    scale = (x.abs().amax(-1) / largest).float()
    scaled = x / scale.double()[..., None]
    rounded = (scaled.round() if values.dtype == torch.int8 else scaled.clamp(-448, 448)).to(values.dtype)
    values.view(torch.int8)[at] = rounded.view(torch.int8)
    scales[at] = scale
    return rounded.double() * scale.double()[..., None]


def attention(q: Tensor, sequence: Sequence, seen: Tensor, rule: AttentionRule, kind: dtype) -> tuple[Tensor, Tensor]:
    """For the queries [rows, heads, head_dim] of one sequence, `seen` [rows, tokens]. Returns values and bounds."""
    heads = q.shape[1]
    group = heads // sequence.k.shape[1]
    outs, bounds = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape, dtype=torch.float64)
    outs, bounds = outs.to(q.device), bounds.to(q.device)
    visible = seen.any(0)
    seen = seen[:, visible]
    if seen.shape[1] == 0:
        return outs, bounds
    unit = HALF_UNIT.get(kind, HALF_UNIT[torch.bfloat16])
    for head in range(heads):
        k, v = (x[visible][:, head // group] for x in (sequence.k, sequence.v))
        x = q[:, head].double()
        scores, sizes = x @ k.T * rule.scale, (x.abs() @ k.abs().T * abs(rule.scale)).amax(1, keepdim=True)
        if rule.softcap:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        exponents = torch.exp(scores - scores.amax(1, keepdim=True)).masked_fill(~seen, 0.0)
        sums = exponents.sum(1, keepdim=True)
        if rule.sinks is not None:
            sums = sums + torch.exp(rule.sinks[head].double() - scores.amax(1, keepdim=True))
        weights = exponents / sums
        out, spread = weights @ v, weights @ v.abs()
        rounding = (weights.square() @ v.square()).sqrt() + out.abs() * weights.square().sum(1, keepdim=True).sqrt()
        float32 = 2.0**-20 * (4 + sizes + rule.softcap) * (spread + out.abs())
        smallest = 2.0**-24 * len(k) * v.abs().amax() if kind == torch.float16 else 0.0
        outs[:, head] = out
        bounds[:, head] = DEVIATIONS * unit * rounding + 2.0**-8 * 1.01 * out.abs() + float32 + smallest
    return outs, bounds


def visible(length: int, queries: int, rule: AttentionRule, on: device, *, is_causal: bool = True) -> Tensor:
    """Which of `length` tokens the last `queries` of them see."""
    distance = torch.arange(length - queries, length)[:, None] - torch.arange(length)[None]
    seen = (distance >= 0) if is_causal else torch.ones_like(distance, dtype=torch.bool)
    return (seen & (distance.abs() < rule.window) if rule.window else seen).to(on)

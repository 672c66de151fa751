"""Mixture of experts: the experts' matrices over tiles of rows, and the sum over each token's experts.

A pair is one token with one of its experts: pair = token * top_k + choice. A tile is BLOCK_M pairs of one expert. What
a pair yields goes to a row of its own and is summed afterwards, in the order of the choices: no atomics, so a step that
runs again gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmserve.ops.cuda.triton_kernels.common import activate, bound, multiply, narrow, sigmoid


@triton.jit
def _tile_of_program(num_tiles, num_columns, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """(tile, block of columns) of this program.

    TOGETHER tiles take a block of columns one after another: tiles of one expert lie side by side and find its weights
    in the L2 cache, even where a whole expert is larger than that.
    """
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_columns, BLOCK_N)
    first = program // (TOGETHER * num_blocks) * TOGETHER
    height = tl.minimum(num_tiles - first, TOGETHER)
    within = program % (TOGETHER * num_blocks)
    return first + within % height, within // height


@triton.jit
def _rows_of_tile(
    tile, pairs, tile_expert, num_pairs, TOP_K: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(expert, pairs [BLOCK_M]) of a tile; no pair is num_pairs or more, an expert below 0 is no tile.

    LAYOUT "sorted": as `place_kernel` wrote them. "few": at most BLOCK_M tokens, so an expert's pairs fit into one
    tile, where row t is token t; `tile_expert` is what the router chose, and the first pair of an expert is its tile.
    It saves two launches. "every": each token goes to all TOP_K experts, which needs no table at all.
    """
    row = tl.arange(0, BLOCK_M)
    if LAYOUT == "sorted":
        expert = tl.load(tile_expert + tile)
        pair = tl.load(pairs + tile * BLOCK_M + row, mask=(row >= 0) & (expert >= 0), other=num_pairs)
    elif LAYOUT == "few":
        choice = tl.arange(0, triton.next_power_of_2(TOP_K))[None, :]
        pairs_of_row = row[:, None] * TOP_K + choice
        ids = tl.load(tile_expert + pairs_of_row, mask=(choice < TOP_K) & (pairs_of_row < num_pairs), other=-1)
        expert = tl.load(tile_expert + tile)
        pair = tl.min(tl.where(ids == expert, pairs_of_row, num_pairs), axis=1)
        expert = tl.where(tl.min(pair, axis=0) == tile, expert, -1)
    else:
        tiles = tl.cdiv(num_pairs // TOP_K, BLOCK_M)
        expert = tile // tiles
        pair = (tile % tiles * BLOCK_M + row) * TOP_K + expert
    return expert, pair


@triton.jit
def _step(
    total,
    x,
    values,
    scales,
    biases,
    column,
    k,
    columns,
    depth,
    stride,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`total + x @ w.T` for inputs k … k + BLOCK_K - 1 of one expert; `values` and the others point to that expert.

    Codes are multiplied as whole numbers, which bfloat16 holds exactly, and the group's scale multiplies the product:
    no weight is rounded to bfloat16. A step never leaves a group; short ones come STEPS at a time, so that as much is
    on its way from memory as with bfloat16.
    """
    inside = (column < columns)[:, None]
    if BITS == 16:
        index = k + tl.arange(0, BLOCK_K)
        w = tl.load(
            values + column[:, None] * stride + index[None, :], mask=inside & (index < depth)[None, :], other=0.0
        )
        total += multiply(x, tl.trans(w))
    else:
        if BITS == 8:
            index = k + tl.arange(0, BLOCK_K)
            w = tl.load(
                values + column[:, None] * stride + index[None, :], mask=inside & (index < depth)[None, :], other=0
            )
            codes = w.to(tl.int32)
        else:
            index = k // 2 + tl.arange(0, BLOCK_K // 2)
            known = inside & (index < depth // 2)[None, :]
            w = tl.load(values + column[:, None] * stride + index[None, :], mask=known, other=0).to(tl.int32)
            codes = tl.interleave(w & 15, w >> 4)
            if biases is None:
                codes -= 8
        # Past the depth x is 0, whatever the codes are.
        product = multiply(x, tl.trans(narrow(codes.to(tl.float32))))
        group = column * (depth // GROUP) + k // GROUP
        there = (column < columns) & (k < depth)
        total += product * tl.load(scales + group, mask=there, other=0.0).to(tl.float32)[None, :]
        if biases is not None:
            sums = tl.sum(x.to(tl.float32), axis=1)
            total += sums[:, None] * tl.load(biases + group, mask=there, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def gate_up_kernel(
    x, out, pairs, tile_expert, gate, gate_scales, gate_biases, up, up_scales, up_biases, num_pairs, num_tiles,
    columns, depth, x_stride, gate_expert_stride, gate_stride, up_expert_stride, up_stride, GROUP: tl.constexpr,
    BITS: tl.constexpr, ACT: tl.constexpr, TOP_K: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """`out[pair] = act(x[token] @ gate.T) * (x[token] @ up.T)` for BLOCK_M pairs and BLOCK_N columns."""
    tile, block = _tile_of_program(num_tiles, columns, BLOCK_N, TOGETHER)
    expert, pair = _rows_of_tile(tile, pairs, tile_expert, num_pairs, TOP_K, LAYOUT, BLOCK_M)
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    pair = pair.to(tl.int64)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    gate += expert * gate_expert_stride
    up += expert * up_expert_stride
    if BITS < 16:
        per_expert = expert * columns * (depth // GROUP)
        gate_scales += per_expert
        up_scales += per_expert
        if gate_biases is not None:
            gate_biases += per_expert
        if up_biases is not None:
            up_biases += per_expert
    rows = x + (pair // TOP_K)[:, None] * x_stride
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, bound(depth), BLOCK_K * STEPS):
        for step in tl.static_range(STEPS):
            k = first + step * BLOCK_K
            index = k + tl.arange(0, BLOCK_K)
            part = tl.load(
                rows + index[None, :], mask=(pair < num_pairs)[:, None] & (index < depth)[None, :], other=0.0
            )
            gates = _step(
                gates, part, gate, gate_scales, gate_biases, column, k, columns, depth, gate_stride,
                GROUP, BITS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            ups = _step(
                ups, part, up, up_scales, up_biases, column, k, columns, depth, up_stride,
                GROUP, BITS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    inner = activate(gates, ACT) * ups
    there = (pair < num_pairs)[:, None] & (column < columns)[None, :]
    tl.store(out + pair[:, None] * columns + column[None, :], narrow(inner), mask=there)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def down_kernel(
    x, out, pairs, tile_expert, mixing, down, scales, biases, num_pairs, num_tiles, columns, depth, expert_stride,
    stride, GROUP: tl.constexpr, BITS: tl.constexpr, TOP_K: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """`out[pair] = mixing[pair] * (x[pair] @ down.T)` for BLOCK_M pairs and BLOCK_N columns; no `mixing` is 1."""
    tile, block = _tile_of_program(num_tiles, columns, BLOCK_N, TOGETHER)
    expert, pair = _rows_of_tile(tile, pairs, tile_expert, num_pairs, TOP_K, LAYOUT, BLOCK_M)
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    pair = pair.to(tl.int64)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    down += expert * expert_stride
    if BITS < 16:
        scales += expert * columns * (depth // GROUP)
        if biases is not None:
            biases += expert * columns * (depth // GROUP)
    rows = x + pair[:, None] * depth
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, bound(depth), BLOCK_K * STEPS):
        for step in tl.static_range(STEPS):
            k = first + step * BLOCK_K
            index = k + tl.arange(0, BLOCK_K)
            part = tl.load(
                rows + index[None, :], mask=(pair < num_pairs)[:, None] & (index < depth)[None, :], other=0.0
            )
            total = _step(
                total, part, down, scales, biases, column, k, columns, depth, stride, GROUP, BITS, BLOCK_N, BLOCK_K
            )
    if mixing is not None:
        total *= tl.load(mixing + pair, mask=pair < num_pairs, other=0.0)[:, None]
    there = (pair < num_pairs)[:, None] & (column < columns)[None, :]
    tl.store(out + pair[:, None] * columns + column[None, :], narrow(total), mask=there)


@triton.jit
def combine_kernel(
    parts, shared, shared_gate, residual, out, columns, residual_stride, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: its experts in the order of choice, the shared ones times the sigmoid of their gate, the residual.

    parts is [T, TOP_K, columns], shared [T, SHARED, columns], shared_gate the gate's logits [T]. Summed in float32.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(parts + (token * TOP_K + choice) * columns + column, mask=there, other=0.0).to(tl.float32)
    if SHARED > 0:
        everyone = tl.zeros((BLOCK,), tl.float32)
        for index in tl.static_range(SHARED):
            row = shared + (token * SHARED + index) * columns
            everyone += tl.load(row + column, mask=there, other=0.0).to(tl.float32)
        if shared_gate is not None:
            everyone *= sigmoid(tl.load(shared_gate + token))
        total += everyone
    if residual is not None:
        total += tl.load(residual + token * residual_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * columns + column, narrow(total), mask=there)

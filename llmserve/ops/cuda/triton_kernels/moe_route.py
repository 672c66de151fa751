"""Mixture of experts: which experts a token goes to, and the tiles of rows that each expert then multiplies.

No value of these kernels reaches the host: the number of tiles is bounded by the shapes alone, and tiles that are not
needed are marked (expert -1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmserve.ops.cuda.triton_kernels.common import bound, sigmoid


@triton.jit
def _best_groups(choice, valid, group, TOP_GROUPS: tl.constexpr, BY_TWO: tl.constexpr):
    """[GROUPS, 1], true for the groups whose experts may be chosen. `choice` is [GROUPS, SIZE]."""
    lowest = float("-inf")
    best = tl.max(choice, axis=1, keep_dims=True)
    if BY_TWO:
        # The second best is the best without one place of the best, which may stand there twice.
        place = tl.broadcast_to(tl.arange(0, choice.shape[1])[None, :], choice.shape)
        first = tl.min(tl.where(choice == best, place, choice.shape[1]), axis=1, keep_dims=True)
        second = tl.max(tl.where(place == first, lowest, choice), axis=1, keep_dims=True)
        ranking = best + second
    else:
        ranking = best
    chosen = tl.zeros_like(valid)
    for _ in tl.static_range(TOP_GROUPS):
        open_ = valid & (chosen == 0)
        top = tl.max(tl.where(open_, ranking, lowest), axis=0, keep_dims=True)
        index = tl.min(tl.where(open_ & (ranking == top), group, 1 << 30), axis=0, keep_dims=True)
        chosen = chosen | (group == index)
    return chosen


@triton.jit
def route_kernel(
    logits, bias, ids, weights, logits_stride, scaling, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, PADDED_SIZE: tl.constexpr, TOP_K: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token: its TOP_K experts, best first, the lower index first among equals.

    Experts lie as a matrix [GROUPS, SIZE], padded to powers of two, so one pass serves routers with and without groups.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED_GROUPS)[:, None]
    place = tl.arange(0, PADDED_SIZE)[None, :]
    valid = (group < GROUPS) & (place < SIZE)
    expert = tl.where(valid, group * SIZE + place, -1)  # padding has the index of no expert
    lowest = float("-inf")
    raw = tl.load(logits + token * logits_stride + expert, mask=valid, other=lowest).to(tl.float32)
    if SIGMOID:
        scores = sigmoid(tl.where(valid, raw, 0.0))
    else:
        highest = tl.max(tl.max(tl.where(raw == raw, raw, lowest), axis=1), axis=0)
        powers = tl.exp(raw - tl.where(highest == lowest, 0.0, highest))
        scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    choice = scores
    if bias is not None:
        choice = choice + tl.load(bias + expert, mask=valid, other=0.0)
    # A score that is not a number is never preferred; that something is chosen keeps every index in bounds.
    choice = tl.where(valid & (choice == choice), choice, lowest)
    if GROUPS > 1:
        allowed = _best_groups(choice, group < GROUPS, group, TOP_GROUPS, (bias is not None) and SIZE > 1)
        choice = tl.where(allowed, choice, lowest)

    slot = tl.arange(0, triton.next_power_of_2(TOP_K))
    chosen = tl.zeros_like(slot)
    mixing = tl.zeros(slot.shape, tl.float32)
    total = 0.0
    taken = valid == 0
    for k in tl.static_range(TOP_K):
        candidates = tl.where(taken, lowest, choice)
        top = tl.max(tl.max(candidates, axis=1), axis=0)
        equal = (taken == 0) & (candidates == top)
        index = tl.min(tl.min(tl.where(equal, expert, 1 << 30), axis=1), axis=0)
        weight = tl.sum(tl.sum(tl.where(expert == index, scores, 0.0), axis=1), axis=0)
        taken = taken | (expert == index)
        chosen = tl.where(slot == k, index, chosen)
        mixing = tl.where(slot == k, weight, mixing)
        total += weight
    if NORMALIZE:
        mixing = mixing / total
    tl.store(ids + token * TOP_K + slot, chosen, mask=slot < TOP_K)
    tl.store(weights + token * TOP_K + slot, mixing * scaling, mask=slot < TOP_K)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(ids, counts, num_pairs, CHUNK: tl.constexpr):
    """One expert: how many pairs of token and choice are its own."""
    expert = tl.program_id(0)
    count = 0
    for start in range(0, bound(num_pairs), CHUNK):
        pair = start + tl.arange(0, CHUNK)
        count += tl.sum((tl.load(ids + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32), axis=0)
    tl.store(counts + expert, count)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def place_kernel(
    ids, counts, pairs, tile_expert, num_pairs, num_tiles, EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One expert: its pairs in ascending order, in tiles of BLOCK_M that are its own.

        tile        0          1          2          3
        expert      0          0          2         -1        (expert 1 has no pairs; tile 3 is not needed)
        pairs    p p p p | p p . . | p p p . | ? ? ? ?        . is num_pairs, which is no pair; ? is not written

    The order is that of the pairs, not of arrival, so a step that runs again does the same.
    """
    expert = tl.program_id(0)
    other = tl.arange(0, PADDED_EXPERTS)
    tiles = tl.cdiv(tl.load(counts + other, mask=other < EXPERTS, other=0), BLOCK_M)
    first_tile = tl.sum(tl.where(other < expert, tiles, 0), axis=0)
    own_tiles = tl.sum(tl.where(other == expert, tiles, 0), axis=0)
    lane = tl.arange(0, CHUNK)

    placed = first_tile * BLOCK_M
    for start in range(0, bound(num_pairs), CHUNK):
        pair = start + lane
        own = tl.load(ids + pair, mask=pair < num_pairs, other=-1) == expert
        rank = tl.cumsum(own.to(tl.int32), axis=0)
        tl.store(pairs + placed + rank - 1, pair, mask=own)
        placed += tl.sum(own.to(tl.int32), axis=0)
    end = (first_tile + own_tiles) * BLOCK_M
    padding = placed + tl.arange(0, BLOCK_M)
    tl.store(pairs + padding, tl.zeros_like(padding) + num_pairs, mask=padding < end)

    for start in range(0, bound(own_tiles), CHUNK):
        tl.store(tile_expert + first_tile + start + lane, tl.zeros_like(lane) + expert, mask=start + lane < own_tiles)
    if expert == EXPERTS - 1:
        for start in range(bound(first_tile + own_tiles), bound(num_tiles), CHUNK):
            tl.store(tile_expert + start + lane, tl.zeros_like(lane) - 1, mask=start + lane < num_tiles)

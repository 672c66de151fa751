"""Mixture of experts on the GPU, in Triton: route, group, multiply, combine.

    x [T, hidden] ─ route ─→ ids, mixing [T, k] ─ group ─→ tiles of one expert each
        └─ gate_up ─→ inner [T * k, intermediate] ─ down ─→ parts [T * k, hidden] ─ combine ─→ y [T, hidden]

Invariants: shapes alone decide what is launched, nothing synchronizes with the host, and every sum has a fixed order,
so a step can be captured into a CUDA graph and gives the same bits each time. Routing is that of `reference_moe`, with
logits in float32. Between the two products values are bfloat16, and so is what one expert yields; sums are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from llmserve.ops.cuda.library import check, check_dense, check_device
from llmserve.ops.cuda.stacked_weights import StackedWeights
from llmserve.ops.cuda.triton_kernels.moe_experts import combine_kernel, down_kernel, gate_up_kernel
from llmserve.ops.cuda.triton_kernels.moe_route import count_kernel, place_kernel, route_kernel
from llmserve.ops.protocol import ActKind, RouterSpec

_CHUNK: Final = 1024
"""Pairs that a program of `group` looks at in one go."""


@dataclass(frozen=True, slots=True)
class Router:
    """The router with its tensors on the device. Logits decide, so its weight is float32, `[num_experts, hidden]`."""

    spec: RouterSpec
    weight: Tensor
    choice_bias: Tensor | None = None
    """float32, [num_experts]."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts with their tensors on the device, as `ExpertsSpec`. Gate and up may be halves of one tensor."""

    gate: StackedWeights
    up: StackedWeights
    down: StackedWeights
    act: ActKind = "silu"
    shared: Experts | None = None
    shared_gate: Tensor | None = None
    """float32, [hidden]."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Tile and resources of one product."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one number of rows for each expert is tiled."""

    rows: int
    gate_up: Shape
    down: Shape


# By the mean rows of an expert, chosen for an H200 by arithmetic, not measured yet. Up to 16 rows weights are all that
# is read: narrow tiles make more programs than SMs at one token (8 experts of 768 columns: 192), and 4 stages of 16 KB
# keep 48 KB in flight for each; 60 KB of shared memory and 64 registers let 3 run on an SM. From 128 rows on the tensor
# cores bound it: gate and up together are a tile of 128 x 128, and 2 programs of 96 KB and at most 125 registers run on
# an SM. No shape takes more than 99 KB, what GPUs of sm_86 and sm_89 have. `tests.cuda.triton_compile` prints these.
_TILES: Final = (
    Tiles(16, Shape(32, 128, 4, 4), Shape(64, 128, 4, 4)),
    Tiles(32, Shape(64, 64, 4, 4), Shape(64, 128, 4, 4)),
    Tiles(64, Shape(64, 64, 4, 4), Shape(128, 64, 4, 4)),
    Tiles(128, Shape(64, 64, 8, 3), Shape(128, 64, 8, 3)),
)
# Codes need registers for a group's product beside the sum, so their tiles are smaller or have more threads.
_CODE_TILES: Final = (
    Tiles(16, Shape(32, 128, 4, 4), Shape(32, 128, 4, 4)),
    Tiles(32, Shape(64, 64, 4, 4), Shape(64, 64, 4, 4)),
    Tiles(64, Shape(64, 64, 8, 4), Shape(128, 64, 8, 4)),
)
_TOGETHER: Final = 8


@dataclass(frozen=True, slots=True)
class Groups:
    """Which pairs each tile multiplies, by which expert (see `place_kernel`)."""

    layout: str
    num_tiles: int
    pairs: Tensor | None
    tile_expert: Tensor | None


def tiles_for(num_pairs: int, experts: Experts) -> Tiles:
    """The tiles for pairs that are spread evenly."""
    mean = math.ceil(num_pairs / experts.gate.shape[0])
    choice = _TILES if experts.gate.bits == experts.down.bits == 16 else _CODE_TILES
    return next((tiles for tiles in choice if mean <= tiles.rows), choice[-1])


def route(logits: Tensor, spec: RouterSpec, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Experts of each token, int32, and their weights, float32, both [T, top_k], the best first.

    `logits` is [T, experts]. Equal scores: the lower index first. Sigmoids below 1e-8 are told apart, which the
    reference's float32 does not do.
    """
    check("logits", logits, dtypes=(torch.float32, torch.bfloat16), shape=(logits.shape[0], spec.num_experts))
    if choice_bias is not None:
        check_dense("choice_bias", choice_bias, dtypes=(torch.float32,), shape=(spec.num_experts,))
    if spec.num_experts % spec.num_groups or not 1 <= spec.top_k <= spec.num_experts:
        raise ValueError(f"top_k: {spec.top_k} of {spec.num_experts} experts in {spec.num_groups} groups")
    if not 1 <= spec.top_k_groups <= spec.num_groups:
        raise ValueError(f"top_k_groups: {spec.top_k_groups} of {spec.num_groups}")
    check_device(logits=logits, choice_bias=choice_bias)
    size = spec.num_experts // spec.num_groups
    ids = torch.empty((len(logits), spec.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((len(logits), spec.top_k), dtype=torch.float32, device=logits.device)
    if len(logits) > 0:
        route_kernel[(len(logits),)](
            logits,
            choice_bias,
            ids,
            weights,
            logits.stride(0),
            float(spec.scaling),
            GROUPS=spec.num_groups,
            SIZE=size,
            PADDED_GROUPS=triton.next_power_of_2(spec.num_groups),
            PADDED_SIZE=triton.next_power_of_2(size),
            TOP_K=spec.top_k,
            TOP_GROUPS=spec.top_k_groups,
            SIGMOID=spec.scoring == "sigmoid",
            NORMALIZE=spec.normalize == "after_top_k",
            num_warps=1,
        )
    return ids, weights


def group(ids: Tensor, num_experts: int, rows: int) -> Groups:
    """Tiles of `rows` pairs for the experts `ids` [T, k], dense int32, which differ within a token.

    Few tokens need no table: each expert's pairs fit into one tile. Else there are at most as many tiles as experts
    with pairs, plus the full ones that the remaining pairs make.
    """
    num_pairs = ids.numel()
    if len(ids) <= rows:
        return Groups("few", num_pairs, None, ids)
    started = min(num_experts, num_pairs)
    num_tiles = started + (num_pairs - started) // rows
    counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    pairs = torch.empty(num_tiles * rows, dtype=torch.int32, device=ids.device)
    tile_expert = torch.empty(num_tiles, dtype=torch.int32, device=ids.device)
    count_kernel[(num_experts,)](ids, counts, num_pairs, CHUNK=_CHUNK)
    place_kernel[(num_experts,)](
        ids,
        counts,
        pairs,
        tile_expert,
        num_pairs,
        num_tiles,
        EXPERTS=num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=rows,
        CHUNK=_CHUNK,
    )
    return Groups("sorted", num_tiles, pairs, tile_expert)


def moe(x: Tensor, router: Router, experts: Experts, *, residual: Tensor | None = None) -> Tensor:
    """The experts' feed-forward of x [T, hidden] plus the residual, in bfloat16. Raises `ValueError`."""
    check_arguments(x, router, experts, residual)
    if len(x) == 0:
        return torch.empty_like(x)
    spec = router.spec
    ids, mixing = route(F.linear(x.float(), router.weight), spec, router.choice_bias)
    tiles = tiles_for(ids.numel(), experts)
    parts = _feed_forward(x, experts, group(ids, spec.num_experts, tiles.rows), tiles, top_k=spec.top_k, mixing=mixing)
    shared = gate = None
    num_shared = 0
    if experts.shared is not None:
        num_shared = experts.shared.gate.shape[0]
        tiles = tiles_for(len(x) * num_shared, experts.shared)
        everyone = Groups("every", num_shared * math.ceil(len(x) / tiles.rows), None, None)
        shared = _feed_forward(x, experts.shared, everyone, tiles, top_k=num_shared, mixing=None)
        if experts.shared_gate is not None:
            gate = x.float() @ experts.shared_gate
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = 1024
    combine_kernel[(len(x), math.ceil(x.shape[1] / block))](
        parts,
        shared,
        gate,
        residual,
        out,
        x.shape[1],
        0 if residual is None else residual.stride(0),
        TOP_K=spec.top_k,
        SHARED=num_shared,
        BLOCK=block,
    )
    return out


def check_arguments(x: Tensor, router: Router, experts: Experts, residual: Tensor | None) -> None:
    """Raises `ValueError` naming the argument that the kernels could not take."""
    spec = router.spec
    tokens, hidden = x.shape
    check("x", x, dtypes=(torch.bfloat16,), shape=(tokens, hidden))
    check("router", router.weight, dtypes=(torch.float32,), shape=(spec.num_experts, hidden))
    _check_experts("", experts, spec.num_experts, hidden)
    if experts.shared is not None:
        _check_experts("shared.", experts.shared, experts.shared.gate.shape[0], hidden)
    if experts.shared_gate is not None:
        check("shared_gate", experts.shared_gate, dtypes=(torch.float32,), shape=(hidden,))
    if residual is not None:
        check("residual", residual, dtypes=(torch.bfloat16,), shape=(tokens, hidden))
    check_device(x=x, router=router.weight, gate=experts.gate.values, residual=residual)


def _check_experts(prefix: str, experts: Experts, num_experts: int, hidden: int) -> None:
    columns = experts.gate.shape[1]
    experts.gate.check(f"{prefix}gate", (num_experts, columns, hidden))
    experts.up.check(f"{prefix}up", (num_experts, columns, hidden))
    experts.down.check(f"{prefix}down", (num_experts, hidden, columns))
    if (experts.gate.bits, experts.gate.group) != (experts.up.bits, experts.up.group):
        raise ValueError(f"{prefix}up: its bits or groups are not those of gate")


def _feed_forward(
    x: Tensor, experts: Experts, groups: Groups, tiles: Tiles, *, top_k: int, mixing: Tensor | None
) -> Tensor:
    """What each pair's expert makes of its token, times its weight: [T * top_k, hidden]."""
    num_pairs = len(x) * top_k
    gate, up, down = experts.gate, experts.up, experts.down
    inner = torch.empty((num_pairs, gate.shape[1]), dtype=x.dtype, device=x.device)
    gate_up_kernel[_grid(groups, gate, tiles.gate_up)](
        x,
        inner,
        groups.pairs,
        groups.tile_expert,
        gate.values,
        gate.scales,
        gate.biases,
        up.values,
        up.scales,
        up.biases,
        num_pairs,
        groups.num_tiles,
        gate.shape[1],
        gate.shape[2],
        x.stride(0),
        *gate.values.stride()[:2],
        *up.values.stride()[:2],
        ACT=experts.act,
        **_constants(gate, groups, tiles.rows, tiles.gate_up, top_k),
    )
    parts = torch.empty((num_pairs, down.shape[1]), dtype=x.dtype, device=x.device)
    down_kernel[_grid(groups, down, tiles.down)](
        inner,
        parts,
        groups.pairs,
        groups.tile_expert,
        mixing,
        down.values,
        down.scales,
        down.biases,
        num_pairs,
        groups.num_tiles,
        down.shape[1],
        down.shape[2],
        *down.values.stride()[:2],
        **_constants(down, groups, tiles.rows, tiles.down, top_k),
    )
    return parts


def _grid(groups: Groups, weights: StackedWeights, shape: Shape) -> tuple[int]:
    return (groups.num_tiles * math.ceil(weights.shape[1] / shape.columns),)


def _constants(weights: StackedWeights, groups: Groups, rows: int, shape: Shape, top_k: int) -> dict[str, int | str]:
    """What a product is compiled for. Inputs go by steps that never leave a group."""
    whole = weights.group == weights.shape[2]
    inputs = shape.depth if whole else math.gcd(weights.group, shape.depth)
    return {
        "GROUP": weights.group,
        "BITS": weights.bits,
        "TOP_K": top_k,
        "LAYOUT": groups.layout,
        "BLOCK_M": rows,
        "BLOCK_N": shape.columns,
        "BLOCK_K": inputs,
        "STEPS": shape.depth // inputs,
        "TOGETHER": _TOGETHER,
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }

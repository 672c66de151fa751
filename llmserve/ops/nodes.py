"""What the compiler emits: nodes and buffers as plain data, before they become a `_C.Program`.

Invariants: nodes run in list order; a buffer is written by one node and read by later ones only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmserve.ops.protocol import ActKind, AttentionSpec, NormKind, RopeSpec
from llmserve.types import CheckpointTensor

TILE = 64
"""Output channels of a packed tile (csrc/cpu/layout.h)."""
GROUP = 32
"""Values that share a quantization scale."""
F32, Q8, BF16, I8 = 1, 2, 4, 8
"""Forms of a buffer, or-ed."""

PackedType = Literal[
    "q4_0", "q4_1", "q4_g64", "q4_g64m", "q4_g128", "q4_g128m", "q4_nl",
    "q5_0", "q5_1", "q2_k", "q3_k", "q6_k", "q8_0", "i8", "bf16", "f32",
]  # fmt: skip
RowDomain = Literal["tokens", "logits"]

PLAIN, GATED, QUERY, KEY, VALUE = range(5)
"""Kinds of a GEMM's work item (csrc/cpu/node.h)."""


@dataclass(slots=True, eq=False)
class Buffer:
    """A value in the arena."""

    rows: RowDomain
    columns: int
    forms: int = 0
    offset: int = -1


@dataclass(slots=True, eq=False)
class Matrix:
    """Rows of checkpoint tensors in packing order: `sources[tile] = (tensor, first row, num rows)`."""

    type: PackedType
    tensors: list[CheckpointTensor] = field(default_factory=list)
    sources: list[tuple[int, int, int]] = field(default_factory=list)

    def add_rows(self, tensor: CheckpointTensor, first: int, count: int) -> int:
        """Append tiles that hold these rows; returns the first tile."""
        if tensor not in self.tensors:
            self.tensors.append(tensor)
        index, tile = self.tensors.index(tensor), len(self.sources)
        for row in range(first, first + count, TILE):
            self.sources.append((index, row, min(TILE, first + count - row)))
        return tile


@dataclass(slots=True, eq=False, kw_only=True)
class Node:
    """Base of all nodes. `out` is None for a node that writes elsewhere (KV cache, sampled tokens)."""

    reads: list[Buffer] = field(default_factory=list)
    out: Buffer | None = None
    second_out: Buffer | None = None
    """The head's: the largest logit of each tile."""


@dataclass(slots=True, eq=False, kw_only=True)
class ZeroBlocksNode(Node):
    pass


@dataclass(slots=True, eq=False, kw_only=True)
class CopyBlocksNode(Node):
    pass


@dataclass(slots=True, eq=False, kw_only=True)
class EmbedNode(Node):
    table: CheckpointTensor
    positions: CheckpointTensor | None
    factor: float


@dataclass(slots=True, eq=False, kw_only=True)
class NormNode(Node):
    kind: NormKind
    weight: CheckpointTensor
    bias: CheckpointTensor | None
    eps: float


@dataclass(slots=True, eq=False, kw_only=True)
class GatherNode(Node):
    pass


@dataclass(slots=True, eq=False, kw_only=True)
class ElementwiseNode(Node):
    op: Literal["add", "scale", "act", "gated", "forms", "permute"]
    act: ActKind = "silu"
    by: float = 1.0
    order: tuple[int, ...] | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class GemmNode(Node):
    """`reads`: x, then the residual if there is one.

    An item is (kind, first tile, tiles, out column, columns, head).
    """

    matrix: Matrix
    items: list[tuple[int, int, int, int, int, int]]
    bias: NDArray[np.float32] | None = None
    act: ActKind = "silu"
    factor: float = 1.0
    softcap: float = 0.0


@dataclass(slots=True, eq=False, kw_only=True)
class HeadsNode(GemmNode):
    """A GEMM whose items are whole heads.

    Bias, head norm and rotation follow at once; keys and values go to the cache.
    """

    rope: RopeSpec | None
    query_norm: CheckpointTensor | None
    key_norm: CheckpointTensor | None
    norm_eps: float
    head_dim: int
    layer: int


@dataclass(slots=True, eq=False, kw_only=True)
class AttentionNode(Node):
    spec: AttentionSpec
    layer: int


@dataclass(slots=True, eq=False, kw_only=True)
class SampleNode(Node):
    pass

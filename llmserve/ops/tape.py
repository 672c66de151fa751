"""The tape: a network's forward pass recorded as data, once, at load.

Owns the op records and `TapeBuilder`, the `Ops` of executors that compile. Nothing is computed or refused here;
`ops.compiler` turns a tape into nodes for the CPU, `ops.cuda.lowering` for a GPU. Invariants: records are in execution
order, every value has one producer, and a value's `columns` is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmserve.ops.protocol import (
    ActKind,
    AttentionSpec,
    ExpertsSpec,
    NormKind,
    PoolKind,
    RopeSpec,
    RouterSpec,
)
from llmserve.types import CheckpointTensor


@dataclass(slots=True, eq=False)
class TapeValue:
    """An activation `[num_tokens, columns]`."""

    columns: int
    producer: TapeOp


@dataclass(slots=True, eq=False, kw_only=True)
class TapeOp:
    """One recorded op."""

    inputs: tuple[TapeValue, ...] = ()


@dataclass(slots=True, eq=False, kw_only=True)
class EmbedOp(TapeOp):
    table: CheckpointTensor
    scale: float
    positions: CheckpointTensor | None
    types: CheckpointTensor | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class NormOp(TapeOp):
    weight: CheckpointTensor
    kind: NormKind
    eps: float
    bias: CheckpointTensor | None
    heads: int | None


@dataclass(slots=True, eq=False, kw_only=True)
class LinearOp(TapeOp):
    """Inputs: x, then the residual if there is one."""

    weight: CheckpointTensor
    bias: CheckpointTensor | None
    site: str | None


@dataclass(slots=True, eq=False, kw_only=True)
class SplitOp(TapeOp):
    """One of the parts that a value is split into."""

    first: int
    columns: int


@dataclass(slots=True, eq=False, kw_only=True)
class RopeOp(TapeOp):
    rope: RopeSpec
    heads: int


@dataclass(slots=True, eq=False, kw_only=True)
class AttentionOp(TapeOp):
    """Inputs: q, k, v."""

    spec: AttentionSpec
    layer: int


@dataclass(slots=True, eq=False, kw_only=True)
class ActOp(TapeOp):
    """Inputs: x, then the gate if there is one."""

    kind: ActKind


@dataclass(slots=True, eq=False, kw_only=True)
class AddOp(TapeOp):
    pass


@dataclass(slots=True, eq=False, kw_only=True)
class ScaleOp(TapeOp):
    by: float


@dataclass(slots=True, eq=False, kw_only=True)
class MoeOp(TapeOp):
    """Inputs: x, then the residual if there is one."""

    router: RouterSpec
    experts: ExpertsSpec


@dataclass(slots=True, eq=False, kw_only=True)
class LogitsOp(TapeOp):
    head: CheckpointTensor
    softcap: float | None
    scale: float


@dataclass(slots=True, eq=False, kw_only=True)
class PoolOp(TapeOp):
    kind: PoolKind


@dataclass(slots=True)
class TapeBuilder:
    """`Ops` that records."""

    ops: list[TapeOp] = field(default_factory=list)

    def _record(self, op: TapeOp, columns: int) -> TapeValue:
        self.ops.append(op)
        return TapeValue(columns, op)

    def embed(
        self,
        table: CheckpointTensor,
        *,
        scale: float = 1.0,
        positions: CheckpointTensor | None = None,
        types: CheckpointTensor | None = None,
    ) -> TapeValue:
        return self._record(EmbedOp(table=table, scale=scale, positions=positions, types=types), table.shape[1])

    def norm(
        self,
        x: TapeValue,
        weight: CheckpointTensor,
        *,
        kind: NormKind,
        eps: float,
        bias: CheckpointTensor | None = None,
        heads: int | None = None,
    ) -> TapeValue:
        return self._record(NormOp(inputs=(x,), weight=weight, kind=kind, eps=eps, bias=bias, heads=heads), x.columns)

    def linear(
        self,
        x: TapeValue,
        weight: CheckpointTensor,
        *,
        bias: CheckpointTensor | None = None,
        residual: TapeValue | None = None,
        site: str | None = None,
    ) -> TapeValue:
        inputs = (x,) if residual is None else (x, residual)
        return self._record(LinearOp(inputs=inputs, weight=weight, bias=bias, site=site), weight.shape[0])

    def split(self, x: TapeValue, sizes: Sequence[int]) -> tuple[TapeValue, ...]:
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return tuple(
            self._record(SplitOp(inputs=(x,), first=first, columns=columns), columns)
            for first, columns in zip(starts, sizes, strict=True)
        )

    def rope(self, x: TapeValue, rope: RopeSpec, *, heads: int) -> TapeValue:
        return self._record(RopeOp(inputs=(x,), rope=rope, heads=heads), x.columns)

    def attention(self, q: TapeValue, k: TapeValue, v: TapeValue, spec: AttentionSpec, *, layer: int) -> TapeValue:
        return self._record(AttentionOp(inputs=(q, k, v), spec=spec, layer=layer), spec.heads * spec.head_dim)

    def act(self, x: TapeValue, kind: ActKind, *, gate: TapeValue | None = None) -> TapeValue:
        return self._record(ActOp(inputs=(x,) if gate is None else (x, gate), kind=kind), x.columns)

    def add(self, x: TapeValue, y: TapeValue) -> TapeValue:
        return self._record(AddOp(inputs=(x, y)), x.columns)

    def scale(self, x: TapeValue, by: float) -> TapeValue:
        return self._record(ScaleOp(inputs=(x,), by=by), x.columns)

    def moe(
        self, x: TapeValue, router: RouterSpec, experts: ExpertsSpec, *, residual: TapeValue | None = None
    ) -> TapeValue:
        inputs = (x,) if residual is None else (x, residual)
        return self._record(MoeOp(inputs=inputs, router=router, experts=experts), x.columns)

    def logits(
        self, x: TapeValue, head: CheckpointTensor, *, softcap: float | None = None, scale: float = 1.0
    ) -> TapeValue:
        return self._record(LogitsOp(inputs=(x,), head=head, softcap=softcap, scale=scale), head.shape[0])

    def pool(self, x: TapeValue, kind: PoolKind) -> TapeValue:
        return self._record(PoolOp(inputs=(x,), kind=kind), x.columns)

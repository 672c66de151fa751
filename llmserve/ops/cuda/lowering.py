"""From a tape to a program on the device: what belongs together is one node, and its weights are brought over.

Fused: Q, K and V into one projection with the head norms, the rotation and the cache's write behind it; gate and up
into one projection with the activation; a projection with its bias and residual; int8 rows into the norm or activation
that makes them. The head, and the norm before it, run on the rows that need logits only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import numpy as np
import torch

from llmserve.errors import CheckpointError
from llmserve.ops import tape as t
from llmserve.ops.cuda import nodes as n
from llmserve.ops.cuda.attention import Attention, FallbackAttention
from llmserve.ops.cuda.kv_append import HeadNorm, Rotation
from llmserve.ops.cuda.kv_cache import MOST_HEAD_DIM
from llmserve.ops.cuda.prefill_attention import query_rows
from llmserve.ops.cuda.projections import DenseProjection, Projection, ProjectionLoader
from llmserve.ops.cuda.step import DETERMINISTIC_SPLIT
from llmserve.ops.cuda.weights import DTYPE, DeviceWeights
from llmserve.ops.protocol import AttentionSpec, RopeSpec

MOST_FALLBACK_DIM: Final = 512
"""Of heads: what Triton's attention keeps in registers."""


def refuse(what: str) -> NoReturn:
    """A network that this executor cannot run is refused at load, before any request."""
    raise CheckpointError(f"the CUDA executor does not support {what} yet")


@dataclass(slots=True, eq=False)
class _Head:
    """A linear op that feeds one input of an attention, with what stands between them."""

    linear: t.LinearOp
    norm: t.NormOp | None
    rope: t.RopeOp | None

    def parts(self) -> list[t.TapeOp]:
        return [part for part in (self.linear, self.norm, self.rope) if part is not None]


@dataclass(slots=True)
class Lowering:
    """One network. `attention` lists its attention layers once it has run."""

    ops: Sequence[t.TapeOp]
    weights: DeviceWeights
    loader: ProjectionLoader
    max_positions: int
    deterministic: bool
    cache_dtype: torch.dtype
    attention: list[t.AttentionOp] = field(default_factory=list)
    _nodes: list[n.Node] = field(default_factory=list)
    _numbers: dict[t.TapeOp, int] = field(default_factory=dict)
    _users: dict[t.TapeOp, list[t.TapeOp]] = field(default_factory=lambda: defaultdict(list))
    _fused: set[t.TapeOp] = field(default_factory=set)
    _heads: dict[t.AttentionOp, list[_Head]] = field(default_factory=dict)
    _ropes: dict[RopeSpec, Rotation] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""
        head = self.ops[-1]
        assert isinstance(head, t.LogitsOp), "run has refused anything else"
        return head.head.shape[0]

    def run(self) -> n.Program:
        """Raises `CheckpointError` for a network that this executor cannot run."""
        for number, op in enumerate(self.ops):
            self._numbers[op] = number
            for value in op.inputs:
                self._users[value.producer].append(op)
        if not self.ops or not isinstance(self.ops[-1], t.LogitsOp):
            refuse("networks that end in anything but logits")
        for op in self.ops:
            self._mark(op)
        for op in self.ops:
            if op not in self._fused:
                self._nodes.append(self._lower(op))
        if not self.attention:
            refuse("networks without attention")
        specs = [op.spec for op in self.attention if self.takes_kernels(op.spec)]
        # Tiles of queries are planned once for all layers.
        if len({(spec.heads // spec.kv_heads, query_rows(spec.head_dim)) for spec in specs}) > 1:
            refuse("layers that differ in query heads per KV head, or in the width of heads across 128")
        return n.Program(_fuse_norms(self._nodes, first_free=len(self.ops) + 2))

    # What is fused into a later op is marked before anything is lowered.

    def _mark(self, op: t.TapeOp) -> None:
        match op:
            case t.AttentionOp():
                heads = [self._head(value) for value in op.inputs] if self.takes_kernels(op.spec) else [None]
                found = [head for head in heads if head is not None]
                if len(found) == len(heads) and _one_transform(found):
                    self._heads[op] = found
                    self._fused.update(part for head in found for part in head.parts())
            case t.ActOp() if self._is_gated(op):
                self._fused.update(value.producer for value in op.inputs)
            case t.LogitsOp():
                norm = op.inputs[0].producer
                if isinstance(norm, t.NormOp) and norm.heads is None and self._users[norm] == [op]:
                    self._fused.add(norm)

    def _head(self, value: t.TapeValue) -> _Head | None:
        rope, norm, op = None, None, value.producer
        if isinstance(op, t.RopeOp) and len(self._users[op]) == 1:
            rope, op = op, op.inputs[0].producer
        if isinstance(op, t.NormOp) and op.heads and op.kind == "rms" and op.bias is None and len(self._users[op]) == 1:
            norm, op = op, op.inputs[0].producer
        if not isinstance(op, t.LinearOp) or len(op.inputs) != 1 or len(self._users[op]) != 1:
            return None
        return _Head(op, norm, rope)

    def _is_gated(self, op: t.ActOp) -> bool:
        parts = [value.producer for value in op.inputs]
        if len(parts) != 2:
            return False
        up, gate = parts
        return (
            isinstance(up, t.LinearOp)
            and isinstance(gate, t.LinearOp)
            and len(up.inputs) == len(gate.inputs) == 1
            and up.inputs[0] is gate.inputs[0]
            and self._users[up] == [op] == self._users[gate]
            and self.loader.fit_together([up.weight, gate.weight])
        )

    # Lowering: the node of an op.

    def _lower(self, op: t.TapeOp) -> n.Node:
        place = self._place(op, *(value.producer for value in op.inputs))
        match op:
            case t.EmbedOp():
                return self._embed(op, place)
            case t.NormOp():
                return self._norm(op, place)
            case t.LinearOp():
                may_overwrite = len(op.inputs) > 1 and self._users[op.inputs[1].producer][-1] is op
                linear = self.loader.load([op.weight], [op.bias])
                return n.LinearNode(**place, projection=linear, may_overwrite=may_overwrite)
            case t.ActOp() if self._is_gated(op):
                return self._gated(op)
            case t.ActOp():
                return n.ActNode(**place, kind=op.kind)
            case t.AddOp():
                return n.AddNode(**place)
            case t.ScaleOp():
                return n.ScaleNode(**place, by=op.by)
            case t.SplitOp():
                return n.SplitNode(**place, first=op.first, columns=op.columns)
            case t.RopeOp():
                return n.RopeNode(**place, rotation=self._rope(op.rope), heads=op.heads)
            case t.AttentionOp():
                return self._attention(op)
            case t.MoeOp():
                if self.deterministic:
                    refuse("mixtures of experts with --deterministic")
                from llmserve.ops.cuda.moe_layer import moe_layer  # Triton, which no other network needs

                return n.MoeNode(**place, layer=moe_layer(op.router, op.experts, self.weights))
            case t.LogitsOp():
                return self._logits(op)
        refuse("pooling")

    def _place(self, op: t.TapeOp, *inputs: t.TapeOp) -> dict[str, Any]:
        return {"inputs": tuple(self._numbers[producer] for producer in inputs), "output": self._numbers[op]}

    def _embed(self, op: t.EmbedOp, place: dict[str, Any]) -> n.EmbedNode:
        return n.EmbedNode(
            **place,
            table=self.weights.matrix(op.table),
            scale=op.scale,
            positions=None if op.positions is None else self.weights.matrix(op.positions),
            # Requests carry no segment ids: all tokens are of the first type.
            type_row=None if op.types is None else self.weights.matrix(op.types)[0],
        )

    def _norm(self, op: t.NormOp, place: dict[str, Any]) -> n.NormNode:
        if op.kind == "rms" and op.bias is not None:
            refuse("RMS norms with a bias")
        return n.NormNode(
            **place,
            kind=op.kind,
            weight=self.weights.vector(op.weight),
            bias=None if op.bias is None else self.weights.vector(op.bias),
            eps=op.eps,
            quantizes=op.kind == "rms" and not op.heads and self._feeds_int8(op),
        )

    def _feeds_int8(self, op: t.TapeOp) -> bool:
        """Whether nothing but int8 projections reads the value."""
        users = self._users[op]
        return bool(users) and all(
            isinstance(user, t.LinearOp)
            and user.inputs[0].producer is op
            and op not in [value.producer for value in user.inputs[1:]]
            and self.loader.is_int8(user.weight)
            for user in users
        )

    def _gated(self, op: t.ActOp) -> n.GatedNode:
        up, gate = (value.producer for value in op.inputs)
        assert isinstance(up, t.LinearOp), "_is_gated holds"
        assert isinstance(gate, t.LinearOp), "_is_gated holds"
        linear = self.loader.load([gate.weight, up.weight], [gate.bias, up.bias])
        place = self._place(op, up.inputs[0].producer)
        return n.GatedNode(**place, projection=linear, kind=op.kind, quantizes=self._feeds_int8(op))

    def _attention(self, op: t.AttentionOp) -> n.AttentionNode:
        spec = op.spec
        if spec.kv_group != "full":
            refuse(f"attention of a KV group other than 'full': {spec.kv_group}")
        self.attention.append(op)
        if not self.takes_kernels(spec):
            return self._fallback(op)
        heads = self._heads.get(op, [])
        projections, sources = self._projections(heads)
        attention = Attention(
            spec=spec,
            layer=op.layer,
            rotation=self._rotation(heads),
            norm=self._head_norm(heads),
            sinks=None if spec.sinks is None else self.weights.vector(spec.sinks),
            fold_tokens=DETERMINISTIC_SPLIT if self.deterministic else 0,
        )
        producers = sources or [value.producer for value in op.inputs]
        return n.AttentionNode(**self._place(op, *producers), attention=attention, projections=projections)

    def takes_kernels(self, spec: AttentionSpec) -> bool:
        """Whether the attention kernels take such heads."""
        return spec.head_dim % (16 // self.cache_dtype.itemsize) == 0 and spec.head_dim <= MOST_HEAD_DIM

    def _fallback(self, op: t.AttentionOp) -> n.AttentionNode:
        if self.cache_dtype != DTYPE:
            refuse(f"heads of {op.spec.head_dim} channels in a KV cache other than bf16")
        if self.deterministic:
            refuse(f"heads of {op.spec.head_dim} channels with --deterministic")
        if op.spec.head_dim > MOST_FALLBACK_DIM:
            refuse(f"heads of {op.spec.head_dim} channels")
        sinks = None if op.spec.sinks is None else self.weights.vector(op.spec.sinks)
        place = self._place(op, *(value.producer for value in op.inputs))
        return n.AttentionNode(**place, attention=FallbackAttention(op.spec, op.layer, sinks))

    def _projections(self, heads: list[_Head]) -> tuple[list[Projection], list[t.TapeOp]]:
        """The projections of Q, K and V, those of one input together where their weights allow it."""
        groups: list[list[t.LinearOp]] = []
        for linear in (head.linear for head in heads):
            last = groups[-1] if groups else None
            if (
                last is not None
                and last[0].inputs[0] is linear.inputs[0]
                and self.loader.fit_together([*(part.weight for part in last), linear.weight])
            ):
                last.append(linear)
            else:
                groups.append([linear])
        linears = [self.loader.load([op.weight for op in ops], [op.bias for op in ops]) for ops in groups]
        return linears, [ops[0].inputs[0].producer for ops in groups]

    def _head_norm(self, heads: list[_Head]) -> HeadNorm | None:
        norms = [head.norm for head in heads[:2]]
        eps = next((norm.eps for norm in norms if norm is not None), None)
        weights = [None if norm is None else self.weights.vector(norm.weight) for norm in norms]
        return None if eps is None else HeadNorm(q=weights[0], k=weights[1], eps=eps)

    def _rotation(self, heads: list[_Head]) -> Rotation | None:
        rope = heads[0].rope if heads else None
        return None if rope is None else self._rope(rope.rope)

    def _rope(self, spec: RopeSpec) -> Rotation:
        """Cosine and sine by position, [max_positions, rotary_dim / 2, 2], from angles in float64."""
        if spec not in self._ropes:
            angles = np.arange(self.max_positions, dtype=np.float64)[:, None] * spec.inv_freq
            both = np.stack((np.cos(angles), np.sin(angles)), -1) * spec.attention_factor
            self._ropes[spec] = Rotation(self.weights.keep(both.astype(np.float32)), spec.style)
        return self._ropes[spec]

    def _logits(self, op: t.LogitsOp) -> n.LogitsNode:
        """Before it the rows are gathered, and normalized where the norm feeds nothing else."""
        source = op.inputs[0].producer
        norm = source if source in self._fused and isinstance(source, t.NormOp) else None
        rows = norm.inputs[0].producer if norm is not None else source
        gathered = len(self.ops)
        self._nodes.append(n.GatherNode(inputs=(self._numbers[rows],), output=gathered))
        if norm is not None:
            self._nodes.append(self._norm(norm, {"inputs": (gathered,), "output": gathered + 1}))
            gathered += 1
        return n.LogitsNode(
            inputs=(gathered,),
            output=self._numbers[op],
            head=self.loader.load([op.head], [None]),
            softcap=op.softcap or 0.0,
            scale=op.scale,
        )


def _fuse_norms(nodes: Sequence[n.Node], first_free: int) -> list[n.Node]:
    """A norm right behind a projection of cuBLAS adds that to the residual stream: one pass over it instead of two.

    `first_free`: numbers of values from here on are not taken.
    """
    fused: list[n.Node] = []
    for node in nodes:
        last = fused[-1] if fused else None
        if (
            isinstance(node, n.NormNode)
            and isinstance(last, n.LinearNode)
            and isinstance(last.projection, DenseProjection)
            and len(last.inputs) == 2
            and last.may_overwrite
            and node.inputs == (last.output,)
        ):
            x, stream = last.inputs
            whole, added = last.output, first_free
            first_free += 1
            last.inputs, last.output = (x,), added
            node.inputs = stream, added
            fused += [node, n.SameNode(inputs=(stream,), output=whole)]
        else:
            fused.append(node)
    return fused


def _one_transform(heads: list[_Head]) -> bool:
    """Whether the kernel that writes the cache can do what stands behind these projections."""
    query, key, value = heads
    norms = [head.norm for head in (query, key) if head.norm is not None]
    ropes = [None if head.rope is None else head.rope.rope for head in (query, key)]
    return value.norm is None and value.rope is None and ropes[0] is ropes[1] and len({norm.eps for norm in norms}) <= 1

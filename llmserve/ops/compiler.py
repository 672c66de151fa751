"""The compiler pass: a tape becomes nodes in which what belongs together is fused.

Fused: Q, K and V projections with bias, head norm, rotation and the KV write; gate and up projections with the gated
activation; a projection with its bias and residual; and quantization of activations into whatever produces them. The
head runs on the rows that need logits only, and so does the norm before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.dequantize import dequantize
from llmserve.errors import CheckpointError
from llmserve.ops import nodes as n
from llmserve.ops import tape as t
from llmserve.types import CheckpointTensor


def refuse(what: str) -> NoReturn:
    """A network that this executor cannot run yet is refused at load, before any request."""
    raise CheckpointError(f"the CPU executor does not support {what} yet")


@dataclass(slots=True, eq=False)
class Projection:
    """A linear op that feeds one input of an attention, with what stands between them."""

    linear: t.LinearOp
    norm: t.NormOp | None
    rope: t.RopeOp | None


@dataclass(slots=True)
class Plan:
    """The compiled network, and what the KV cache must hold."""

    nodes: list[n.Node]
    attention: list[n.AttentionNode]


_PACKED: dict[str, n.PackedType] = {
    "q4_0": "q4_0",
    "i4_g32": "q4_0",
    "q4_1": "q4_1",
    "q4_k": "q4_1",
    "u4_g32": "q4_1",
    "i4_g64": "q4_g64",
    "u4_g64": "q4_g64m",
    "i4_g128": "q4_g128",
    "u4_g128": "q4_g128m",
    "iq4_nl": "q4_nl",
    "iq4_xs": "q4_nl",
    "q5_0": "q5_0",
    "q5_1": "q5_1",
    "q5_k": "q5_1",
    "q2_k": "q2_k",
    "q3_k": "q3_k",
    "q6_k": "q6_k",
    "q8_0": "q8_0",
    "i8": "i8",
}


def packed_type(tensor: CheckpointTensor, *, exact: bool) -> n.PackedType:
    """The packed form of a weight: that of its quantization, BF16 (exact: float32) for plain floats."""
    if exact and tensor.dtype == "i8":
        return "f32"
    return _PACKED.get(tensor.dtype, "f32" if exact else "bf16")


def activation_form(type_: n.PackedType, *, exact: bool) -> int:
    """The form in which a GEMM with such weights reads its input."""
    if exact or type_ == "f32":
        return n.F32
    return {"bf16": n.BF16, "i8": n.I8}.get(type_, n.Q8)


@dataclass(slots=True)
class Compiler:
    """One compilation. `exact` keeps activations and float weights in float32."""

    ops: Sequence[t.TapeOp]
    exact: bool
    nodes: list[n.Node] = field(default_factory=list)
    _buffers: dict[t.TapeOp, n.Buffer] = field(default_factory=dict)
    _users: dict[t.TapeOp, list[t.TapeOp]] = field(default_factory=lambda: defaultdict(list))
    _fused: set[t.TapeOp] = field(default_factory=set)
    _rewritten: dict[tuple[t.TapeOp, tuple[int, ...] | None], n.Buffer] = field(default_factory=dict)

    def run(self) -> Plan:
        """Raises `CheckpointError` for a network this executor cannot run."""
        for op in self.ops:
            _check_supported(op)
            for value in op.inputs:
                self._users[value.producer].append(op)
        for op in self.ops:
            self._mark(op)
        self.nodes += [n.ZeroBlocksNode(), n.CopyBlocksNode()]
        for op in self.ops:
            if op not in self._fused:
                self._lower(op)
        if not isinstance(self.nodes[-1], n.SampleNode):
            refuse("networks that end in anything but logits")
        attention = [node for node in self.nodes if isinstance(node, n.AttentionNode)]
        _check_attention(attention)
        return Plan(self.nodes, attention)

    # What is fused into a later op is marked before anything is lowered.

    def _mark(self, op: t.TapeOp) -> None:
        match op:
            case t.AttentionOp():
                for value in op.inputs:
                    projection = self._projection(value)
                    chain = (projection.linear, projection.norm, projection.rope)
                    self._fused.update(part for part in chain if part is not None)
            case t.ActOp() if self._gated(op):
                self._fused.update(value.producer for value in op.inputs)
            case t.LogitsOp():
                producer = op.inputs[0].producer
                if isinstance(producer, t.NormOp) and producer.heads is None and self._users[producer] == [op]:
                    self._fused.add(producer)

    def _projection(self, value: t.TapeValue) -> Projection:
        rope, norm, op = None, None, value.producer
        if isinstance(op, t.RopeOp):
            rope, op = op, self._only_input(op)
        if isinstance(op, t.NormOp):
            norm, op = op, self._only_input(op)
        if not isinstance(op, t.LinearOp) or len(op.inputs) != 1 or len(self._users[op]) != 1:
            refuse("attention over anything but projections of its own")
        if norm is not None and (norm.heads is None or norm.kind != "rms" or norm.bias is not None):
            refuse("queries and keys normalized other than by RMS over each head")
        return Projection(op, norm, rope)

    def _only_input(self, op: t.TapeOp) -> t.TapeOp:
        if len(self._users[op]) != 1:
            refuse("projections that are used twice")
        return op.inputs[0].producer

    def _gated(self, op: t.ActOp) -> bool:
        parts = [value.producer for value in op.inputs]
        if len(parts) != 2 or not all(isinstance(part, t.LinearOp) and len(part.inputs) == 1 for part in parts):
            return False
        up, gate = (part for part in parts if isinstance(part, t.LinearOp))
        return (
            up.inputs[0] is gate.inputs[0]
            and up.weight.shape == gate.weight.shape
            and self._type(up.weight) == self._type(gate.weight)
            and up.weight.order == gate.weight.order
            and self._users[up] == [op] == self._users[gate]
        )

    # Lowering: one method per op.

    def _lower(self, op: t.TapeOp) -> None:
        match op:
            case t.EmbedOp():
                node = n.EmbedNode(table=op.table, positions=op.positions, factor=op.scale)
                self._emit(op, node, op.table.shape[1])
            case t.NormOp():
                self._lower_norm(op)
            case t.LinearOp():
                self._lower_linear(op)
            case t.ActOp() if self._gated(op):
                self._lower_gated(op)
            case t.ActOp():
                kind: Literal["act", "gated"] = "act" if len(op.inputs) == 1 else "gated"
                self._emit(op, n.ElementwiseNode(op=kind, act=op.kind, reads=self._read(op)), op.inputs[0].columns)
            case t.AddOp():
                self._emit(op, n.ElementwiseNode(op="add", reads=self._read(op)), op.inputs[0].columns)
            case t.ScaleOp():
                node_ = n.ElementwiseNode(op="scale", by=op.by, reads=self._read(op))
                self._emit(op, node_, op.inputs[0].columns)
            case t.AttentionOp():
                self._lower_attention(op)
            case t.LogitsOp():
                self._lower_logits(op)
            case _:
                refuse(f"{type(op).__name__} outside a projection")

    def _emit(self, op: t.TapeOp, node: n.Node, columns: int) -> n.Buffer:
        node.out = n.Buffer("tokens", columns)
        self._buffers[op] = node.out
        self.nodes.append(node)
        return node.out

    def _read(self, op: t.TapeOp, form: int = n.F32) -> list[n.Buffer]:
        return [self._input(value, form) for value in op.inputs]

    def _input(self, value: t.TapeValue, form: int, order: tuple[int, ...] | None = None) -> n.Buffer:
        """The buffer of a value in a form, its columns in an order of their own where a weight asks for it.

        Only a norm makes whole rows at once, as the I8 form needs: it has one scale a row.
        """
        buffer = self._buffers[value.producer]
        if order is None and (form != n.I8 or isinstance(value.producer, t.NormOp)):
            buffer.forms |= form
            return buffer
        key = value.producer, order
        if key not in self._rewritten:
            buffer.forms |= n.F32
            rewritten = self._rewritten[key] = n.Buffer(buffer.rows, buffer.columns)
            op: Literal["forms", "permute"] = "forms" if order is None else "permute"
            self.nodes.append(n.ElementwiseNode(op=op, order=order, reads=[buffer], out=rewritten))
        self._rewritten[key].forms |= form
        return self._rewritten[key]

    def _weight_input(self, op: t.LinearOp) -> n.Buffer:
        return self._input(op.inputs[0], self._form(op.weight), op.weight.order)

    def _type(self, weight: CheckpointTensor) -> n.PackedType:
        return packed_type(weight, exact=self.exact)

    def _form(self, weight: CheckpointTensor) -> int:
        return activation_form(self._type(weight), exact=self.exact)

    def _lower_norm(self, op: t.NormOp) -> None:
        if op.heads is not None:
            refuse("head norms outside attention")
        node = n.NormNode(kind=op.kind, weight=op.weight, bias=op.bias, eps=op.eps, reads=self._read(op))
        self._emit(op, node, op.inputs[0].columns)

    def _lower_linear(self, op: t.LinearOp) -> None:
        rows = op.weight.shape[0]
        matrix = n.Matrix(self._type(op.weight))
        matrix.add_rows(op.weight, 0, rows)
        reads = [self._weight_input(op)]
        reads += [self._input(value, n.F32) for value in op.inputs[1:]]
        bias = None if op.bias is None else _tiled([(op.bias, 0, rows)])
        self._emit(op, n.GemmNode(matrix=matrix, items=_plain_items(rows), bias=bias, reads=reads), rows)

    def _lower_gated(self, op: t.ActOp) -> None:
        up, gate = (value.producer for value in op.inputs)
        assert isinstance(up, t.LinearOp), "_gated holds"
        assert isinstance(gate, t.LinearOp), "_gated holds"
        rows = up.weight.shape[0]
        matrix, items = n.Matrix(self._type(up.weight)), []
        parts: list[tuple[CheckpointTensor | None, int, int]] = []
        for row in range(0, rows, n.TILE):
            count = min(n.TILE, rows - row)
            tile = matrix.add_rows(gate.weight, row, count)
            matrix.add_rows(up.weight, row, count)
            parts += [(gate.bias, row, count), (up.bias, row, count)]
            items.append((n.GATED, tile, 2, row, count, 0))
        bias = None if up.bias is None and gate.bias is None else _tiled(parts)
        reads = [self._weight_input(up)]
        self._emit(op, n.GemmNode(matrix=matrix, items=items, bias=bias, act=op.kind, reads=reads), rows)

    def _lower_attention(self, op: t.AttentionOp) -> None:
        spec = op.spec
        queries = n.Buffer("tokens", spec.heads * spec.head_dim, n.F32)
        for node in self._heads_nodes(op, queries):
            self.nodes.append(node)
        out = self._emit(op, n.AttentionNode(spec=spec, layer=op.layer, reads=[queries]), queries.columns)
        if spec.heads // spec.kv_heads * spec.head_dim % n.GROUP != 0:
            # A head group ends inside a quantization group: the forms are made from whole rows.
            out.forms |= n.F32
            self._emit(op, n.ElementwiseNode(op="forms", reads=[out]), queries.columns)

    def _heads_nodes(self, op: t.AttentionOp, queries: n.Buffer) -> list[n.HeadsNode]:
        """One node per (input, packed type, order): usually one for all of Q, K and V."""
        kinds = zip((n.QUERY, n.KEY, n.VALUE), (self._projection(value) for value in op.inputs), strict=True)
        groups: dict[object, list[tuple[int, Projection]]] = defaultdict(list)
        for kind, projection in kinds:
            source = projection.linear.inputs[0].producer
            weight = projection.linear.weight
            groups[source, self._type(weight), weight.order].append((kind, projection))
        return [self._heads_node(op, parts, queries) for parts in groups.values()]

    def _heads_node(self, op: t.AttentionOp, parts: list[tuple[int, Projection]], queries: n.Buffer) -> n.HeadsNode:
        head_dim = op.spec.head_dim
        first = parts[0][1].linear
        matrix, items = n.Matrix(self._type(first.weight)), []
        biases: list[tuple[CheckpointTensor | None, int, int]] = []
        for kind, projection in parts:
            weight = projection.linear.weight
            for head in range(weight.shape[0] // head_dim):
                tile = matrix.add_rows(weight, head * head_dim, head_dim)
                items.append((kind, tile, len(matrix.sources) - tile, head * head_dim, head_dim, head))
                biases.append((projection.linear.bias, head * head_dim, head_dim))
        by_kind = dict(parts)
        norms = {kind: projection.norm for kind, projection in parts if projection.norm is not None}
        # The node has one table for queries and keys: a rotation of only one of them would turn both.
        ropes = {kind: None if p.rope is None else p.rope.rope for kind, p in by_kind.items()}
        rope = ropes.get(n.QUERY, ropes.get(n.KEY))
        if rope is not ropes.get(n.KEY, rope) or ropes.get(n.VALUE) is not None:
            refuse("queries and keys rotated differently")
        if n.VALUE in norms:
            refuse("normalized values")
        if len({norm.eps for norm in norms.values()}) > 1:
            refuse("different epsilons in the norms of queries and keys")
        return n.HeadsNode(
            matrix=matrix,
            items=items,
            bias=None if all(bias is None for bias, _, _ in biases) else _tiled(biases),
            rope=rope,
            query_norm=norms[n.QUERY].weight if n.QUERY in norms else None,
            key_norm=norms[n.KEY].weight if n.KEY in norms else None,
            norm_eps=next((norm.eps for norm in norms.values()), 0.0),
            head_dim=head_dim,
            layer=op.layer,
            reads=[self._weight_input(first)],
            out=queries if n.QUERY in by_kind else None,
        )

    def _lower_logits(self, op: t.LogitsOp) -> None:
        value = op.inputs[0]
        norm = value.producer if value.producer in self._fused else None
        if isinstance(norm, t.NormOp):
            rows = self._gather(norm.inputs[0])
            rows.forms |= n.F32
            normed = n.Buffer("logits", rows.columns)
            node = n.NormNode(kind=norm.kind, weight=norm.weight, bias=norm.bias, eps=norm.eps, reads=[rows])
            node.out = rows = normed
            self.nodes.append(node)
        else:
            rows = self._gather(value)
        rows.forms |= self._form(op.head)
        if op.head.order is not None:
            refuse("a head whose columns are in an order of their own")
        vocab = op.head.shape[0]
        matrix = n.Matrix(self._type(op.head))
        matrix.add_rows(op.head, 0, vocab)
        logits = n.Buffer("logits", vocab, n.F32)
        gemm = n.GemmNode(matrix=matrix, items=_plain_items(vocab), factor=op.scale, reads=[rows], out=logits)
        gemm.softcap = op.softcap or 0.0
        gemm.second_out = n.Buffer("logits", len(matrix.sources), n.F32)
        self.nodes += [gemm, n.SampleNode(reads=[logits, gemm.second_out])]

    def _gather(self, value: t.TapeValue) -> n.Buffer:
        rows = n.Buffer("logits", value.columns)
        self.nodes.append(n.GatherNode(reads=[self._input(value, n.F32)], out=rows))
        return rows


def _check_supported(op: t.TapeOp) -> None:
    match op:
        case t.EmbedOp() if op.types is not None:
            refuse("token type embeddings")
        case t.SplitOp():
            refuse("split projections")
        case t.MoeOp():
            refuse("mixtures of experts")
        case t.PoolOp():
            refuse("pooling")


def _plain_items(rows: int) -> list[tuple[int, int, int, int, int, int]]:
    return [(n.PLAIN, row // n.TILE, 1, row, min(n.TILE, rows - row), 0) for row in range(0, rows, n.TILE)]


def _tiled(parts: Sequence[tuple[CheckpointTensor | None, int, int]]) -> NDArray[np.float32]:
    """Biases in tile order: each part starts at a tile, what is past it is zero."""
    padded = []
    for tensor, first, count in parts:
        tiles = -(-count // n.TILE)
        values = np.zeros(tiles * n.TILE, np.float32)
        if tensor is not None:
            values[:count] = dequantize(tensor).reshape(-1)[first : first + count]
        padded.append(values)
    return np.concatenate(padded)


def _check_attention(attention: Sequence[n.AttentionNode]) -> None:
    if not attention:
        refuse("networks without attention")
    first = attention[0].spec
    for spec in (node.spec for node in attention):
        if (spec.heads, spec.kv_heads, spec.head_dim) != (first.heads, first.kv_heads, first.head_dim):
            refuse("layers that differ in their heads")
        if spec.kv_group != "full":
            refuse("attention of a KV group other than 'full'")
        if spec.head_dim % 16 or spec.head_dim > 512 or spec.heads // spec.kv_heads > 32:
            refuse(f"heads of {spec.head_dim} channels, {spec.heads // spec.kv_heads} query heads per KV head")

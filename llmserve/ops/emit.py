"""Turns compiled nodes into a `_C.Program`: places buffers, loads weights, adds nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmserve import _C
from llmserve.checkpoints.dequantize import dequantize
from llmserve.config import ExecutorConfig
from llmserve.ops import nodes as n
from llmserve.ops.arena import lay_out
from llmserve.ops.protocol import RopeSpec
from llmserve.ops.sources import MatrixSources, tensor_view
from llmserve.ops.weights import LoadedWeights, WeightLoader
from llmserve.types import CheckpointTensor

Progress = Callable[[str, int, int], None]


class Emitter:
    """Builds one program. Its weights must be loaded (`load`) before nodes are added."""

    def __init__(self, program: _C.Program, config: ExecutorConfig, *, exact: bool) -> None:
        self._program = program
        self._config = config
        self._exact = exact
        self._values: dict[n.Buffer, _C.Value] = {}
        self._matrices: dict[n.Matrix, _C.PackedMatrix] = {}
        self._ropes: dict[RopeSpec, _C.RopeTable] = {}
        self.weight_bytes = 0

    def place(self, nodes: Sequence[n.Node]) -> None:
        """Reserve the arena and the weights."""

        def size_of(buffer: n.Buffer) -> int:
            return self._program.value_bytes(buffer.rows, buffer.columns, buffer.forms)

        self._program.reserve_arena(lay_out(nodes, size_of))
        gemms = [node for node in nodes if isinstance(node, n.GemmNode)]
        self.weight_bytes = sum(
            _C.matrix_bytes(node.matrix.type, node.matrix.tensors[0].shape[1], len(node.matrix.sources))
            for node in gemms
        )
        self._program.reserve_weights(self.weight_bytes)

    def load(self, nodes: Sequence[n.Node], progress: Progress) -> LoadedWeights:
        """Add every matrix and get its packed bytes; `progress` is told after each."""
        plan = [node.matrix for node in nodes if isinstance(node, n.GemmNode)]
        sources = [MatrixSources.of(matrix) for matrix in plan]
        for matrix, source in zip(plan, sources, strict=True):
            tiles = np.array(matrix.sources, np.int32)
            self._matrices[matrix] = self._program.add_matrix(matrix.type, source.views, tiles)
        for vector in _vectors(nodes):  # read last, one by one: without this each waits for the disk
            tensor_view(vector).prefetch()
        loader = WeightLoader(self._program, [self._matrices[matrix] for matrix in plan], sources, progress)
        return loader.load(self._config.images, plan)

    def add(self, node: n.Node) -> None:
        """Append one node to the program."""
        program, x = self._program, [self._value(buffer) for buffer in node.reads]
        out = None if node.out is None else self._value(node.out)
        match node:
            case n.ZeroBlocksNode():
                program.add_zero_blocks()
            case n.CopyBlocksNode():
                program.add_copy_blocks()
            case n.EmbedNode():
                positions = None if node.positions is None else tensor_view(node.positions)
                program.add_embed(tensor_view(node.table), positions, node.factor, out)
            case n.NormNode():
                program.add_norm(node.kind, x[0], out, floats(node.weight), floats(node.bias), node.eps)
            case n.GatherNode():
                program.add_gather(x[0], out)
            case n.ElementwiseNode():
                order = None if node.order is None else np.array(node.order, np.int32)
                program.add_elementwise(node.op, x[0], x[1] if len(x) > 1 else None, out, node.act, node.by, order)
            case n.HeadsNode():
                self._add_heads(node, x[0], out)
            case n.GemmNode():
                self._add_gemm(node, x, out)
            case n.AttentionNode():
                self._add_attention(node, x[0], out)
            case n.SampleNode():
                program.add_sample(x[0], x[1])

    def _add_attention(self, node: n.AttentionNode, queries: _C.Value, out: _C.Value | None) -> None:
        spec = node.spec
        self._program.add_attention(
            queries,
            out,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.window,
            node.layer,
            spec.scale,
            bidirectional=spec.mask == "bidirectional",
            softcap=spec.softcap,
            sinks=floats(spec.sinks),
        )

    def _value(self, buffer: n.Buffer) -> _C.Value:
        if buffer not in self._values:
            self._values[buffer] = self._program.add_value(buffer.rows, buffer.columns, buffer.forms, buffer.offset)
        return self._values[buffer]

    def _add_gemm(self, node: n.GemmNode, x: list[_C.Value], out: _C.Value | None) -> None:
        self._program.add_gemm(
            self._matrices[node.matrix],
            x[0],
            out,
            np.array(node.items, np.int32),
            self._exact,
            node.bias,
            x[1] if len(x) > 1 else None,
            node.act,
            node.factor,
            node.softcap,
            None if node.second_out is None else self._value(node.second_out),
        )

    def _add_heads(self, node: n.HeadsNode, x: _C.Value, out: _C.Value | None) -> None:
        self._program.add_heads(
            self._matrices[node.matrix],
            x,
            out,
            np.array(node.items, np.int32),
            self._exact,
            node.bias,
            None if node.rope is None else self._rope(node.rope),
            floats(node.query_norm),
            floats(node.key_norm),
            node.norm_eps,
            node.head_dim,
            node.layer,
        )

    def _rope(self, spec: RopeSpec) -> _C.RopeTable:
        if spec not in self._ropes:
            positions = np.arange(self._config.max_model_len, dtype=np.float64)
            angles = positions[:, None] * spec.inv_freq  # [max_model_len, rotary_dim / 2]
            cosine, sine = ((f(angles) * spec.attention_factor).astype(np.float32) for f in (np.cos, np.sin))
            self._ropes[spec] = self._program.add_rope(cosine, sine, spec.rotary_dim, spec.style == "interleaved")
        return self._ropes[spec]


def _vectors(nodes: Sequence[n.Node]) -> Iterator[CheckpointTensor]:
    """Small tensors that nodes take besides matrices."""
    for node in nodes:
        match node:
            case n.NormNode():
                found: tuple[CheckpointTensor | None, ...] = (node.weight, node.bias)
            case n.HeadsNode():
                found = (node.query_norm, node.key_norm)
            case _:
                found = ()
        yield from (tensor for tensor in found if tensor is not None)


def floats(tensor: CheckpointTensor | None) -> NDArray[np.float32] | None:
    """A small tensor in float32."""
    return None if tensor is None else dequantize(tensor)

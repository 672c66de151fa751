"""What a lowered network is made of: nodes that run one after the other on device tensors.

The residual stream is float32, what projections read bfloat16 or int8.

Invariants: a node's output is a new tensor or, where it says so, its residual; nothing in a node waits for the device,
so a whole run can be captured into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.attention import Attention, FallbackAttention
from llmserve.ops.cuda.kv_append import Rotation
from llmserve.ops.cuda.projections import Projection, QuantizedRows, Rows, operand
from llmserve.ops.cuda.step import DeviceStep
from llmserve.ops.cuda.weights import DTYPE
from llmserve.ops.protocol import ActKind, NormKind


def plain(x: Rows) -> Tensor:
    """Of a value that is not quantized."""
    assert isinstance(x, Tensor), "lowering quantizes only what int8 projections read"
    return x


class MoeLayer(Protocol):
    """Routed experts on the device."""

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 [num_tokens, hidden] of the same."""


@dataclass(slots=True, eq=False, kw_only=True)
class Node:
    """`inputs` and `output` are numbers of values; `frees` are those that nobody reads afterwards."""

    inputs: tuple[int, ...]
    output: int
    frees: tuple[int, ...] = ()

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        """Compute the output."""
        raise NotImplementedError


@dataclass(slots=True, eq=False, kw_only=True)
class EmbedNode(Node):
    table: Tensor
    scale: float
    positions: Tensor | None
    type_row: Tensor | None

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        out = torch.empty((step.num_tokens, self.table.shape[1]), device=self.table.device)
        step.launchers.embed(
            step.token_ids,
            self.table,
            out,
            scale=self.scale,
            positions=None if self.positions is None else step.positions,
            position_table=self.positions,
            type_row=self.type_row,
        )
        return out


@dataclass(slots=True, eq=False, kw_only=True)
class NormNode(Node):
    """Inputs: x; or the residual stream and x, which is added to it, in place, before that is normalized."""

    kind: NormKind
    weight: Tensor
    bias: Tensor | None
    """Of a layer norm."""
    eps: float
    quantizes: bool = False
    """Its rows go to int8 projections only."""

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        stream, added = (plain(x[0]), plain(x[1])) if len(x) > 1 else (None, plain(x[0]))
        rows = added.reshape(-1, self.weight.shape[0])
        if self.quantizes:
            out = QuantizedRows.of_shape(rows.shape, rows.device)
            self._normalize(step, rows, stream, out.values, out.scales)
            return out
        y = torch.empty(rows.shape, dtype=DTYPE, device=rows.device)
        self._normalize(step, rows, stream, y, None)
        return y.reshape(added.shape)

    def _normalize(
        self, step: DeviceStep, rows: Tensor, stream: Tensor | None, out: Tensor, scales: Tensor | None
    ) -> None:
        launchers = step.launchers
        if self.kind == "rms":
            launchers.rms_norm(rows, self.weight, out, eps=self.eps, residual=stream, scales=scales)
        else:
            launchers.layer_norm(rows, self.weight, out, eps=self.eps, bias=self.bias, residual=stream, scales=scales)


@dataclass(slots=True, eq=False, kw_only=True)
class LinearNode(Node):
    """Inputs: x, then the residual stream, float32, if there is one."""

    projection: Projection
    may_overwrite: bool = False
    """Nobody else reads the residual stream as it was."""

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        if len(x) == 1:
            return self.projection(step.launchers, x[0])
        stream = plain(x[1])
        if not self.may_overwrite or stream.dtype != torch.float32:
            stream = stream.to(torch.float32, copy=True)
        self.projection.add_to(step.launchers, x[0], stream)
        return stream


@dataclass(slots=True, eq=False, kw_only=True)
class SameNode(Node):
    """What its input is by now: a residual stream that was added to."""

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        return x[0]


@dataclass(slots=True, eq=False, kw_only=True)
class GatedNode(Node):
    """A projection to gate and up, side by side, and the gated activation."""

    projection: Projection
    kind: ActKind
    quantizes: bool = False

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        both = self.projection.floats(step.launchers, x[0])
        return _act(step, both, self.kind, both.shape[1] // 2, quantizes=self.quantizes)


@dataclass(slots=True, eq=False, kw_only=True)
class ActNode(Node):
    """Inputs: x, then the gate if there is one."""

    kind: ActKind

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        values = [plain(part) for part in x]
        both = values[0] if len(values) == 1 else torch.cat((values[1], values[0]), 1)  # gate | up
        return _act(step, both, self.kind, values[0].shape[1], quantizes=False)


def _act(step: DeviceStep, x: Tensor, kind: ActKind, columns: int, *, quantizes: bool) -> Rows:
    if quantizes:
        rows = QuantizedRows.of_shape((len(x), columns), x.device)
        step.launchers.act(x, rows.values, kind=kind, scales=rows.scales)
        return rows
    out = torch.empty((len(x), columns), dtype=DTYPE, device=x.device)
    step.launchers.act(x, out, kind=kind)
    return out


@dataclass(slots=True, eq=False, kw_only=True)
class AddNode(Node):
    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        return plain(x[0]) + plain(x[1])


@dataclass(slots=True, eq=False, kw_only=True)
class ScaleNode(Node):
    by: float

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        return plain(x[0]) * self.by


@dataclass(slots=True, eq=False, kw_only=True)
class SplitNode(Node):
    first: int
    columns: int

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        return plain(x[0])[:, self.first : self.first + self.columns]


@dataclass(slots=True, eq=False, kw_only=True)
class RopeNode(Node):
    """A rotation outside an attention's projections."""

    rotation: Rotation
    heads: int

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        table, is_interleaved = self.rotation.table, self.rotation.style == "interleaved"
        y = plain(x[0]).reshape(step.num_tokens, self.heads, -1).float()
        cos, sin = table[step.positions.long()][:, None].unbind(-1)  # [T, 1, rotary_dim / 2]
        half = table.shape[1]
        pairs = y[..., : 2 * half].unflatten(-1, (half, 2) if is_interleaved else (2, half))
        first, second = pairs.unbind(-1 if is_interleaved else -2)
        turned = first * cos - second * sin, second * cos + first * sin
        rotated = torch.stack(turned, -1).flatten(-2) if is_interleaved else torch.cat(turned, -1)
        return torch.cat((rotated, y[..., 2 * half :]), -1).to(DTYPE).reshape(plain(x[0]).shape)


@dataclass(slots=True, eq=False, kw_only=True)
class AttentionNode(Node):
    """Inputs: what the projections read, one for each of them; without projections queries, keys and values."""

    attention: Attention | FallbackAttention
    projections: list[Projection] = field(default_factory=list)

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        if self.projections:
            parts = [linear(step.launchers, part) for linear, part in zip(self.projections, x, strict=True)]
        else:
            parts = [operand(part) for part in x]
        return self.attention(step, parts[0] if len(parts) == 1 else torch.cat(parts, 1))


@dataclass(slots=True, eq=False, kw_only=True)
class MoeNode(Node):
    """Inputs: x, then the residual if there is one."""

    layer: MoeLayer

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        y = self.layer(operand(x[0]))
        return y if len(x) == 1 else plain(x[1]) + y


@dataclass(slots=True, eq=False, kw_only=True)
class GatherNode(Node):
    """The rows that need logits."""

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        return plain(x[0]) if step.logit_rows is None else plain(x[0])[step.logit_rows]


@dataclass(slots=True, eq=False, kw_only=True)
class LogitsNode(Node):
    """Float32 [num_logit_rows, vocab]."""

    head: Projection
    softcap: float
    scale: float

    def run(self, step: DeviceStep, *x: Rows) -> Rows:
        y = self.head.floats(step.launchers, x[0])
        y = y if self.scale == 1.0 else y * self.scale
        return self.softcap * torch.tanh(y / self.softcap) if self.softcap else y


@dataclass(slots=True)
class Program:
    """A whole network."""

    nodes: Sequence[Node]

    def __post_init__(self) -> None:
        last = {index: node for node in self.nodes for index in node.inputs}
        for node in self.nodes:
            node.frees = tuple({index for index in node.inputs if last[index] is node})

    def run(self, step: DeviceStep) -> Tensor:
        """Logits of the step's logit rows."""
        values: dict[int, Rows] = {}
        for node in self.nodes:
            values[node.output] = node.run(step, *(values[index] for index in node.inputs))
            for index in node.frees:
                del values[index]
        return plain(values[self.nodes[-1].output])

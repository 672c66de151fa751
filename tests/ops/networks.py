"""Small networks said against `Ops`, one per op or fusion, with random weights of a stored type.

Invariants: a network is a function of its seed; weights of float networks are representable in BF16, so that only
activations are rounded; channels that a network multiplies stay near a standard deviation of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from llmserve.ops import Forward
from llmserve.ops.protocol import ActKind, AttentionSpec, NormKind, Ops, RopeSpec, Value
from llmserve.types import CheckpointTensor

WeightType = Literal["q4_0", "q4_1", "q8_0", "bf16", "f32"]
QUANTIZED: Final = ("q4_0", "q4_1", "q8_0")
VOCAB: Final = 75
MAX_LEN: Final = 64


class Maker:
    """Draws shapes and tensors."""

    def __init__(self, seed: int, weight_type: WeightType) -> None:
        self.random = np.random.default_rng(seed)
        self.weight_type = weight_type
        self.hidden = self.channels()

    def integer(self, low: int, high: int) -> int:
        """Inclusive."""
        return int(self.random.integers(low, high + 1))

    def pick(self, *choices: Any) -> Any:
        return choices[self.integer(0, len(choices) - 1)]

    def channels(self) -> int:
        """A width that the weight type can have as its inner dimension."""
        return 32 * self.integer(1, 7) if self.weight_type in QUANTIZED else self.integer(20, 200)

    def matrix(self, rows: int, columns: int) -> CheckpointTensor:
        values = self.random.normal(size=(rows, columns)).astype(np.float32) / np.float32(np.sqrt(columns))
        if self.weight_type in QUANTIZED:
            kind = gguf.GGMLQuantizationType[self.weight_type.upper()]
            return _tensor(gguf.quants.quantize(values, kind), self.weight_type, (rows, columns))
        return _tensor((values.view(np.uint32) >> 16).astype(np.uint16), "bf16", (rows, columns))

    def table(self, rows: int, columns: int) -> CheckpointTensor:
        """Float32 rows for a look-up."""
        return _tensor(self.random.normal(size=(rows, columns)).astype(np.float32), "f32", (rows, columns))

    def vector(self, size: int, *, around: float = 0.0) -> CheckpointTensor:
        return _tensor((around + 0.5 * self.random.normal(size=size)).astype(np.float32), "f32", (size,))


def _tensor(stored: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> CheckpointTensor:
    return CheckpointTensor("test", dtype, shape, memoryview(np.ascontiguousarray(stored).tobytes()))


@dataclass(frozen=True, slots=True)
class Network:
    """One op or fusion. `gemms`: roundings of activations before matrices, as far as they reach the logits."""

    build: Callable[[Maker], Forward]
    gemms: float = 1.0
    attends: bool = False


def _with_idle_attention(maker: Maker, body: Callable[[Ops, Value], Value]) -> Forward:
    """embed → body → logits. The CPU executor wants an attention: it has one that adds exact zeros."""
    table, head = maker.table(VOCAB, maker.hidden), maker.matrix(VOCAB, maker.hidden)
    q, k, v = (maker.matrix(32, maker.hidden) for _ in range(3))
    out = maker.matrix(maker.hidden, 32)
    spec = AttentionSpec(heads=1, kv_heads=1, head_dim=32, scale=0.2)

    def forward(ops: Ops) -> Value:
        x = ops.embed(table)
        idle = ops.attention(ops.linear(x, q), ops.linear(x, k), ops.linear(x, v), spec, layer=0)
        y = ops.add(body(ops, x), ops.scale(ops.linear(idle, out), 0.0))
        return ops.logits(y, head)

    return forward


def head_only(maker: Maker) -> Forward:
    return _with_idle_attention(maker, lambda ops, x: x)


def linear(maker: Maker) -> Forward:
    weight, bias = maker.matrix(maker.hidden, maker.hidden), maker.vector(maker.hidden)
    return _with_idle_attention(maker, lambda ops, x: ops.linear(x, weight, bias=bias, residual=x))


def two_linears(maker: Maker) -> Forward:
    """One input, two readers, an inner width of its own."""
    inner = maker.channels()
    up, down, other = (maker.matrix(*shape) for shape in
                       ((inner, maker.hidden), (maker.hidden, inner), (maker.hidden, maker.hidden)))  # fmt: skip
    return _with_idle_attention(
        maker, lambda ops, x: ops.linear(ops.linear(x, up), down, residual=ops.linear(x, other))
    )


def _normed(kind: NormKind) -> Callable[[Maker], Forward]:
    def build(maker: Maker) -> Forward:
        weight = maker.vector(maker.hidden, around=1.0)
        bias = maker.vector(maker.hidden) if kind == "layer" else None
        matrix, eps = maker.matrix(maker.hidden, maker.hidden), maker.pick(1e-6, 1e-5, 0.2)

        def body(ops: Ops, x: Value) -> Value:
            return ops.linear(ops.norm(x, weight, kind=kind, eps=eps, bias=bias), matrix)

        return _with_idle_attention(maker, body)

    return build


def _gated(act: ActKind) -> Callable[[Maker], Forward]:
    def build(maker: Maker) -> Forward:
        inner, biased = maker.channels(), maker.pick(False, True)
        gate, up, down = (maker.matrix(*shape) for shape in
                          ((inner, maker.hidden), (inner, maker.hidden), (maker.hidden, inner)))  # fmt: skip
        biases = [maker.vector(inner) if biased else None for _ in range(2)]

        def body(ops: Ops, x: Value) -> Value:
            h = ops.act(ops.linear(x, up, bias=biases[0]), act, gate=ops.linear(x, gate, bias=biases[1]))
            return ops.linear(h, down, residual=x)

        return _with_idle_attention(maker, body)

    return build


def unfused(maker: Maker) -> Forward:
    """Activations, sums and products that no projection swallows."""
    matrix, act = maker.matrix(maker.hidden, maker.hidden), maker.pick("silu", "gelu", "gelu_tanh", "relu2")

    def body(ops: Ops, x: Value) -> Value:
        y = ops.linear(x, matrix)
        return ops.add(ops.scale(ops.act(y, act), 0.7), ops.act(x, "silu", gate=y))

    return _with_idle_attention(maker, body)


def positions_and_caps(maker: Maker) -> Forward:
    """Learned positions, scaled embedding, final layer norm; logits scaled, then capped."""
    table, places = maker.table(VOCAB, maker.hidden), maker.table(MAX_LEN, maker.hidden)
    head, bias = maker.matrix(VOCAB, maker.hidden), maker.vector(maker.hidden)
    weight = maker.vector(maker.hidden, around=1.0)
    q, k, v = (maker.matrix(32, maker.hidden) for _ in range(3))
    spec, kind = AttentionSpec(heads=1, kv_heads=1, head_dim=32, scale=0.2), maker.pick("rms", "layer")
    mix = maker.matrix(maker.hidden, 32)

    def forward(ops: Ops) -> Value:
        x = ops.embed(table, scale=1.7, positions=places)
        idle = ops.attention(ops.linear(x, q), ops.linear(x, k), ops.linear(x, v), spec, layer=0)
        y = ops.add(x, ops.scale(ops.linear(idle, mix), 0.0))
        y = ops.norm(y, weight, kind=kind, eps=1e-5, bias=bias if kind == "layer" else None)
        return ops.logits(y, head, softcap=2.5, scale=1.9)

    return forward


def _attention(**fixed: Any) -> Callable[[Maker], Forward]:
    """One attention layer; what is not fixed is drawn: heads, widths, window, rope, biases, head norms."""

    def build(maker: Maker) -> Forward:
        head_dim = fixed.get("head_dim") or maker.pick(16, 32, 48, 64, 80, 96, 128)
        if maker.weight_type in QUANTIZED and head_dim % 32 != 0:
            head_dim = 32 if head_dim < 64 else 96
        kv_heads, group = maker.integer(1, 3), fixed.get("group") or maker.integer(1, 4)
        shape = (kv_heads * group, kv_heads, head_dim)
        window = maker.pick(0, 5, 17) if "window" not in fixed else fixed["window"]
        sinks = maker.vector(shape[0], around=1.0) if fixed.get("sinks") else None
        spec = AttentionSpec(heads=shape[0], kv_heads=kv_heads, head_dim=head_dim, scale=1.2 * head_dim**-0.5,
                             window=window, softcap=fixed.get("softcap", 0.0), sinks=sinks,
                             mask=fixed.get("mask", "causal"))  # fmt: skip
        rope = _rope(maker, head_dim, fixed.get("style", maker.pick("half", "interleaved")), fixed.get("partial"))
        return _attention_forward(maker, spec, rope, biased=fixed.get("biased"), normed=fixed.get("normed"))

    return build


def _rope(maker: Maker, head_dim: int, style: Any, partial: bool | None) -> RopeSpec | None:
    if style is None:
        return None
    partial = maker.pick(False, True) if partial is None else partial
    rotary_dim = 2 * maker.integer(2, head_dim // 4) if partial else head_dim
    inv_freq = 100.0 ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    return RopeSpec(style=style, rotary_dim=rotary_dim, inv_freq=inv_freq, attention_factor=maker.pick(1.0, 1.1))


def _attention_forward(
    maker: Maker, spec: AttentionSpec, rope: RopeSpec | None, *, biased: bool | None, normed: bool | None
) -> Forward:
    widths = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
    table, head = maker.table(VOCAB, maker.hidden), maker.matrix(VOCAB, maker.hidden)
    weights = [maker.matrix(width, maker.hidden) for width in widths]
    with_bias = maker.pick(False, True) if biased is None else biased
    biases = [maker.vector(width) if with_bias else None for width in widths]
    with_norm = maker.pick(False, True) if normed is None else normed
    norms = [maker.vector(spec.head_dim, around=1.0) if with_norm else None for _ in range(2)]
    out = maker.matrix(maker.hidden, widths[0])

    def turned(ops: Ops, x: Value, index: int, heads: int) -> Value:
        y = ops.linear(x, weights[index], bias=biases[index])
        norm = norms[index]
        y = y if norm is None else ops.norm(y, norm, kind="rms", eps=1e-5, heads=heads)
        return y if rope is None else ops.rope(y, rope, heads=heads)

    def forward(ops: Ops) -> Value:
        x = ops.embed(table)
        q, k = turned(ops, x, 0, spec.heads), turned(ops, x, 1, spec.kv_heads)
        v = ops.linear(x, weights[2], bias=biases[2])
        return ops.logits(ops.linear(ops.attention(q, k, v, spec, layer=0), out), head)

    return forward


def mixed_types(maker: Maker) -> Forward:
    """Queries and values of another type than keys: one node cannot hold all three."""
    spec = AttentionSpec(heads=2, kv_heads=1, head_dim=64, scale=0.2)
    table, head = maker.table(VOCAB, maker.hidden), maker.matrix(VOCAB, maker.hidden)
    q, v, out = maker.matrix(128, maker.hidden), maker.matrix(64, maker.hidden), maker.matrix(maker.hidden, 128)
    other = Maker(maker.integer(0, 1 << 30), "q8_0" if maker.weight_type in ("q4_0", "q4_1") else maker.weight_type)
    k = other.matrix(64, maker.hidden)
    rope = _rope(maker, 64, "half", False)
    assert rope is not None

    def forward(ops: Ops) -> Value:
        x = ops.embed(table)
        queries, keys = ops.rope(ops.linear(x, q), rope, heads=2), ops.rope(ops.linear(x, k), rope, heads=1)
        a = ops.attention(queries, keys, ops.linear(x, v), spec, layer=0)
        return ops.logits(ops.linear(a, out, residual=x), head)

    return forward


def llama_layers(maker: Maker) -> Forward:
    """Two whole layers, as a model file says them."""
    inner, weight = maker.channels(), maker.matrix
    spec = AttentionSpec(heads=4, kv_heads=2, head_dim=32, scale=0.2)
    rope = _rope(maker, 32, "half", False)
    assert rope is not None
    table, head, hidden = maker.table(VOCAB, maker.hidden), weight(VOCAB, maker.hidden), maker.hidden
    shapes = [
        (128, hidden),
        (64, hidden),
        (64, hidden),
        (hidden, 128),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]
    layers = [[weight(*shape) for shape in shapes] for _ in range(2)]
    norms = [maker.vector(hidden, around=1.0) for _ in range(5)]

    def forward(ops: Ops) -> Value:
        x = ops.embed(table)
        for index, (q, k, v, o, gate, up, down) in enumerate(layers):
            h = ops.norm(x, norms[2 * index], kind="rms", eps=1e-5)
            keys = ops.rope(ops.linear(h, k), rope, heads=2)
            queries = ops.rope(ops.linear(h, q), rope, heads=4)
            x = ops.linear(ops.attention(queries, keys, ops.linear(h, v), spec, layer=index), o, residual=x)
            h = ops.norm(x, norms[2 * index + 1], kind="rms", eps=1e-5)
            x = ops.linear(ops.act(ops.linear(h, up), "silu", gate=ops.linear(h, gate)), down, residual=x)
        return ops.logits(ops.norm(x, norms[4], kind="rms", eps=1e-5), head)

    return forward


NETWORKS: Final = {
    "head": Network(head_only),
    "linear_bias_residual": Network(linear, gemms=1.5),
    "two_linears": Network(two_linears, gemms=3),
    "rms_norm": Network(_normed("rms"), gemms=2),
    "layer_norm": Network(_normed("layer"), gemms=2),
    "gated_silu": Network(_gated("silu"), gemms=2),
    "gated_gelu": Network(_gated("gelu"), gemms=2),
    "gated_gelu_tanh": Network(_gated("gelu_tanh"), gemms=2),
    "gated_relu2": Network(_gated("relu2"), gemms=4),
    "unfused": Network(unfused, gemms=3),
    "positions_and_caps": Network(positions_and_caps, gemms=2),
    "attention": Network(_attention(), gemms=5, attends=True),
    "attention_rope_half": Network(_attention(style="half", partial=False, window=0), gemms=5, attends=True),
    "attention_rope_interleaved": Network(_attention(style="interleaved", partial=False), gemms=5, attends=True),
    "attention_rope_half_partial": Network(_attention(style="half", partial=True), gemms=5, attends=True),
    "attention_rope_interleaved_partial": Network(_attention(style="interleaved", partial=True), gemms=5, attends=True),
    "attention_window": Network(_attention(window=7, group=2), gemms=5, attends=True),
    "attention_window_of_one": Network(_attention(window=1), gemms=5, attends=True),
    "attention_softcap": Network(_attention(softcap=0.4), gemms=5, attends=True),
    "attention_sinks": Network(_attention(sinks=True), gemms=5, attends=True),
    "attention_bias": Network(_attention(biased=True, style=None, group=3), gemms=5, attends=True),
    "attention_norm": Network(_attention(normed=True), gemms=5, attends=True),
    "attention_one_row_heads": Network(_attention(head_dim=16, group=1), gemms=5, attends=True),
    "attention_wide_heads": Network(_attention(head_dim=256, group=1), gemms=5, attends=True),
    "mixed_types": Network(mixed_types, gemms=4, attends=True),
    "llama_layers": Network(llama_layers, gemms=9, attends=True),
}

WHOLE_SEQUENCES: Final = {
    (mask, window): Network(_attention(mask=mask, window=window), gemms=5, attends=True)
    for mask in ("causal", "bidirectional")
    for window in (0, 6)
}
"""Bidirectional attention, for which a step needs all of a sequence; and the causal network of the same draws."""

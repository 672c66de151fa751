"""The reference executor's ops that the Llama family does not use, each against its formula written out in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve.config import ExecutorConfig, RopeConfig
from llmserve.ops.protocol import ActKind, AttentionSpec, ExpertsSpec, Ops, RopeSpec, RouterSpec, Value
from llmserve.ops.reference import ReferenceExecutor
from llmserve.ops.rope import rope_spec
from llmserve.types import CheckpointTensor
from tests.ops.running import Piece, ScatteredBlocks, make_step

RNG_SEED = 11
Array = NDArray[np.float32]


def random(*shape: int, seed: int = RNG_SEED) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(values: Any) -> CheckpointTensor:
    stored = np.ascontiguousarray(values, np.float32)
    return CheckpointTensor("made", "f32", stored.shape, memoryview(stored.tobytes()))


def run(forward: Any, pieces: list[Piece]) -> Array:
    """Steps of one piece each, through an executor; the rows of what the forward returned."""
    executor = ReferenceExecutor(forward, ExecutorConfig(block_size=4), progress=lambda what, done, total: None)
    executor.block_pool = ScatteredBlocks(4, 8)
    executor.allocate_kv(32)
    return np.concatenate([executor.run(make_step([piece], num_logprobs=-1)) for piece in pieces])


def attend(spec: AttentionSpec, x: Array, *, chunks: tuple[int, ...]) -> Array:
    """Self-attention with q, k, v taken from the columns of an embedding table, [T, heads * head_dim]."""
    sizes = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
    table = tensor(x)

    def forward(ops: Ops) -> Value:
        q, k, v = ops.split(ops.embed(table), sizes)
        return ops.attention(q, k, v, spec, layer=0)

    starts = np.cumsum([0, *chunks]).tolist()
    return run(forward, [Piece(1, list(range(a, b)), a) for a, b in pairwise(starts)])


def attend_by_loops(spec: AttentionSpec, x: Array, sinks: Array | None = None) -> Array:
    q, k, v = np.split(x.astype(np.float64), np.cumsum([spec.heads, spec.kv_heads]) * spec.head_dim, axis=1)
    y = np.zeros((len(x), spec.heads * spec.head_dim))
    for i in range(len(x)):
        for head in range(spec.heads):
            own = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
            kv = head // (spec.heads // spec.kv_heads)
            shared = slice(kv * spec.head_dim, (kv + 1) * spec.head_dim)
            seen = [j for j in range(len(x)) if (spec.mask == "bidirectional" or j <= i)]
            seen = [j for j in seen if not spec.window or abs(i - j) < spec.window]
            scores = [float(q[i, own] @ k[j, shared]) * spec.scale for j in seen]
            if spec.softcap:
                scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
            total = sum(math.exp(score) for score in scores) + (0 if sinks is None else math.exp(sinks[head]))
            for j, score in zip(seen, scores, strict=True):
                y[i, own] += math.exp(score) / total * v[j, shared]
    return y.astype(np.float32)


@pytest.mark.parametrize("chunks", [(13,), (1, 5, 7)])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.5}, {"window": 5, "softcap": 0.7}])
def test_causal_attention(options: dict[str, Any], chunks: tuple[int, ...]) -> None:
    spec = AttentionSpec(heads=6, kv_heads=2, head_dim=4, scale=0.8, **options)
    x = random(13, 40)
    np.testing.assert_allclose(attend(spec, x, chunks=chunks), attend_by_loops(spec, x), atol=2e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_bidirectional_attention_without_a_cache(window: int) -> None:
    spec = AttentionSpec(
        heads=2, kv_heads=2, head_dim=6, scale=0.5, mask="bidirectional", window=window, kv_group="none"
    )
    x = random(9, 36)
    np.testing.assert_allclose(attend(spec, x, chunks=(9,)), attend_by_loops(spec, x), atol=2e-5)


def test_attention_sinks_take_weight_and_give_no_value() -> None:
    sinks = random(4)
    spec = AttentionSpec(heads=4, kv_heads=2, head_dim=4, scale=0.5, sinks=tensor(sinks))
    x = random(7, 32)
    np.testing.assert_allclose(attend(spec, x, chunks=(3, 4)), attend_by_loops(spec, x, sinks), atol=2e-5)


def test_layer_norm_with_bias_and_embeddings_of_position_and_type() -> None:
    table, positions, types = random(9, 10), random(8, 10, seed=2), random(2, 10, seed=3)
    weight, bias = random(10), random(10, seed=4)

    def forward(ops: Ops) -> Value:
        x = ops.embed(tensors[0], scale=3.0, positions=tensors[1], types=tensors[2])
        return ops.norm(x, tensors[3], kind="layer", eps=1e-3, bias=tensors[4])

    tensors = [tensor(values) for values in (table, positions, types, weight, bias)]
    x = 3.0 * table[[4, 8, 1]].astype(np.float64) + positions[2:5] + types[0]
    centered = x - x.mean(axis=1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-3) * weight + bias
    np.testing.assert_allclose(run(forward, [Piece(0, [4, 8, 1], 2)]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_partial_rotation(style: Any) -> None:
    spec = RopeSpec(style=style, rotary_dim=4, inv_freq=np.array([1.0, 0.3]), attention_factor=1.2)
    table = random(5, 12)
    stored = tensor(table)
    rotated = run(lambda ops: ops.rope(ops.embed(stored), spec, heads=2), [Piece(0, [2, 4], 6)])
    expected = table[[2, 4]].astype(np.float64).reshape(2, 2, 6).copy()
    for row, position in enumerate((6, 7)):
        for head in range(2):
            for pair, (a, b) in enumerate(((0, 2), (1, 3)) if style == "half" else ((0, 1), (2, 3))):
                turn = 1.2 * np.exp(1j * position * spec.inv_freq[pair])
                value = complex(expected[row, head, a], expected[row, head, b]) * turn
                expected[row, head, a], expected[row, head, b] = value.real, value.imag
    np.testing.assert_allclose(rotated, expected.reshape(2, 12), atol=1e-5)


def test_the_two_rotation_styles_are_one_up_to_the_order_of_channels() -> None:
    table, order = random(5, 8), [0, 4, 1, 5, 2, 6, 3, 7]
    half, interleaved = rope_spec(RopeConfig(), 8), rope_spec(RopeConfig(style="interleaved"), 8)
    plain, permuted = tensor(table), tensor(table[:, order])
    piece = Piece(0, [0, 1, 2], 3)
    first = run(lambda ops: ops.rope(ops.embed(plain), half, heads=1), [piece])
    second = run(lambda ops: ops.rope(ops.embed(permuted), interleaved, heads=1), [piece])
    np.testing.assert_array_equal(first[:, order], second)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_activations(kind: ActKind) -> None:
    formulas = {
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu2": lambda x: max(x, 0.0) ** 2,
    }
    x, gate = 3 * random(4, 5), 3 * random(4, 5, seed=5)
    table = tensor(np.concatenate([x, gate], axis=1))

    def forward(ops: Ops) -> Value:
        left, right = ops.split(ops.embed(table), [5, 5])
        return ops.add(ops.act(left, kind), ops.scale(ops.act(left, kind, gate=right), 2.0))

    expected = np.vectorize(formulas[kind])(x) + 2 * np.vectorize(formulas[kind])(gate) * x
    np.testing.assert_allclose(run(forward, [Piece(0, [0, 1, 2, 3], 0)]), expected, rtol=1e-5, atol=1e-5)


def test_logits_are_scaled_then_capped_and_of_the_asked_rows() -> None:
    table, head = random(6, 8), random(11, 8, seed=6)
    stored = tensor(table), tensor(head)
    logits = run(lambda ops: ops.logits(ops.embed(stored[0]), stored[1], softcap=2.0, scale=0.5), [Piece(0, [3, 5], 0)])
    np.testing.assert_allclose(logits, 2 * np.tanh(table[[3, 5]] @ head.T * 0.5 / 2), atol=1e-5)


def softmax(x: Any) -> Any:
    return np.exp(x) / np.exp(x).sum()


def mix(x: Any, router: Any, gate: Any, up: Any, down: Any, *, style: str) -> Any:
    """One token through experts with SiLU, choosing two of four."""
    scores = router.astype(np.float64) @ x
    if style == "mixtral":
        chosen = np.argsort(-scores)[:2]
        weights = softmax(scores[chosen])
    elif style == "qwen":
        chosen = np.argsort(-scores)[:2]
        weights = softmax(scores)[chosen]
    else:  # deepseek: sigmoid, a bias for the choice alone, the better of two groups, scaled
        bias = np.array([0.3, -0.2, 0.1, 0.4])
        sigmoid = 1 / (1 + np.exp(-scores))
        group = int((sigmoid + bias).reshape(2, 2).sum(axis=1).argmax())
        chosen = np.array([2 * group, 2 * group + 1])
        weights = 2.5 * sigmoid[chosen] / sigmoid[chosen].sum()
    inner = [(gate[e] @ x) / (1 + np.exp(-(gate[e] @ x))) * (up[e] @ x) for e in chosen]
    return sum(w * (down[e] @ h) for w, e, h in zip(weights, chosen, inner, strict=True))


@pytest.mark.parametrize("style", ["mixtral", "qwen", "deepseek"])
def test_mixture_of_experts(style: str) -> None:
    table, router = random(7, 6), random(4, 6, seed=1)
    gate, up, down = random(4, 5, 6, seed=2), random(4, 5, 6, seed=3), random(4, 6, 5, seed=4)
    shared = random(1, 5, 6, seed=5), random(1, 5, 6, seed=6), random(1, 6, 5, seed=7)
    extra: dict[str, Any] = {"mixtral": {}, "qwen": {"normalize": "before_top_k"}}.get(style) or {}
    if style == "deepseek":
        bias = tensor([0.3, -0.2, 0.1, 0.4])
        extra = {"scoring": "sigmoid", "choice_bias": bias, "num_groups": 2, "top_k_groups": 1, "scaling": 2.5}
    spec = RouterSpec(weight=tensor(router), num_experts=4, top_k=2, **extra)
    always = [tensor(values) for values in shared]
    common = ExpertsSpec(always[0], always[1], always[2]) if style == "deepseek" else None
    experts = ExpertsSpec(tensor(gate), tensor(up), tensor(down), shared=common)
    stored = tensor(table)

    def forward(ops: Ops) -> Value:
        x = ops.embed(stored)
        return ops.moe(x, spec, experts, residual=x)

    expected = [row + mix(row, router, gate, up, down, style=style) for row in table]
    if common is not None:
        gate, up, down = (values[0] for values in shared)
        inner = [(gate @ row) / (1 + np.exp(-(gate @ row))) * (up @ row) for row in table]
        expected = [row + down @ h for row, h in zip(expected, inner, strict=True)]
    np.testing.assert_allclose(run(forward, [Piece(0, list(range(7)), 0)]), np.stack(expected), atol=2e-5)


@pytest.mark.parametrize(("kind", "rows"), [("mean", slice(0, 7)), ("cls", slice(0, 1)), ("last", slice(6, 7))])
def test_pooling_accumulates_over_chunks(kind: Any, rows: slice) -> None:
    table = random(7, 5)
    stored = tensor(table)
    pieces = [Piece(1, [0, 1, 2], 0), Piece(1, [3], 3), Piece(1, [4, 5, 6], 4)]
    vectors = run(lambda ops: ops.pool(ops.embed(stored), kind), pieces)
    np.testing.assert_allclose(vectors[-1], table[rows].mean(axis=0), atol=1e-6)

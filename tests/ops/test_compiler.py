"""The compiler pass: what is fused, what is refused, and that buffers which live at once never share bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve import _C
from llmserve.checkpoints import open_checkpoint
from llmserve.errors import CheckpointError, InvalidRequest
from llmserve.models.catalog import load_model
from llmserve.ops import Forward
from llmserve.ops import cpu as cpu_executor
from llmserve.ops import nodes as n
from llmserve.ops.arena import lay_out, lifetimes
from llmserve.ops.protocol import AttentionSpec, Ops, RopeSpec, Value
from tests.ops.networks import NETWORKS, Maker
from tests.ops.op_running import compile_plan, executor_config
from tests.tiny import checkpoints
from tests.tiny.models import MODELS

SPEC = AttentionSpec(heads=2, kv_heads=1, head_dim=32, scale=0.2)


# --- arena -----------------------------------------------------------------------------------------------------------


def assert_no_overlap(nodes: Sequence[n.Node], size_of: Callable[[n.Buffer], int], total: int) -> None:
    spans = lifetimes(nodes)
    for buffer, (first, last) in spans.items():
        assert buffer.offset >= 0
        assert buffer.offset + size_of(buffer) <= total
        for other, (other_first, other_last) in spans.items():
            if other is buffer or other_first > last or first > other_last:
                continue
            apart = buffer.offset + size_of(buffer) <= other.offset or other.offset + size_of(other) <= buffer.offset
            assert apart, f"{buffer} and {other} live at the same time"


@given(st.data())
def test_buffers_that_live_at_once_are_apart(data: st.DataObject) -> None:
    """Random graphs: each node reads some of the buffers written so far and writes one."""
    buffers: list[n.Buffer] = []
    sizes: dict[n.Buffer, int] = {}
    nodes: list[n.Node] = []
    for _ in range(data.draw(st.integers(1, 25), label="nodes")):
        reads = data.draw(st.lists(st.sampled_from(buffers), max_size=3, unique=True)) if buffers else []
        out = n.Buffer("tokens", 64)
        sizes[out] = 64 * data.draw(st.integers(0, 20), label="size")
        buffers.append(out)
        nodes.append(n.GatherNode(reads=reads, out=out if data.draw(st.booleans()) or not reads else None))
    total = lay_out(nodes, lambda buffer: sizes.get(buffer, 0))
    assert_no_overlap(nodes, lambda buffer: sizes.get(buffer, 0), total)


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_have_apart_and_aligned_buffers(name: str) -> None:
    plan = compile_plan(NETWORKS[name].build(Maker(7, "q4_1")), exact=False)
    total = lay_out(plan.nodes, bytes_of)
    assert_no_overlap(plan.nodes, bytes_of, total)
    assert all(buffer.offset % 64 == 0 for buffer in lifetimes(plan.nodes))


def bytes_of(buffer: n.Buffer) -> int:
    program = _C.Program("", 1, max_num_tokens=13, max_num_seqs=1, max_logit_rows=13, max_position=13)
    return program.value_bytes(buffer.rows, buffer.columns, buffer.forms)


def test_the_arena_of_many_layers_is_not_larger_than_that_of_two() -> None:
    def size(layers: int) -> int:
        plan = compile_plan(_stack(Maker(3, "q8_0"), layers), exact=False)
        return lay_out(plan.nodes, bytes_of)

    assert size(9) == size(2)


def _stack(maker: Maker, layers: int) -> Forward:
    table, matrix = maker.table(75, 64), maker.matrix(64, 64)
    key = maker.matrix(32, 64)
    norm = maker.vector(64, around=1.0)

    def forward(ops: Ops) -> Value:
        x = ops.embed(table)
        for layer in range(layers):
            h = ops.norm(x, norm, kind="rms", eps=1e-5)
            a = ops.attention(ops.linear(h, matrix), ops.linear(h, key), ops.linear(h, key), SPEC, layer=layer)
            x = ops.linear(a, matrix, residual=x)
        return ops.logits(x, table)

    return forward


# --- fusion ----------------------------------------------------------------------------------------------------------


def kinds(plan_nodes: Sequence[n.Node]) -> Counter[str]:
    return Counter(type(node).__name__ for node in plan_nodes)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "llama_gguf_q4_1", "qwen3_q8_0"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_is_seven_nodes(name: str, exact: bool, tmp_path: Path) -> None:
    """norm, heads, attention, projection, norm, gated, down: nothing of a Llama layer stays unfused."""
    layers = MODELS[name].num_layers
    forward = load_model(open_checkpoint(checkpoints.write(MODELS[name], tmp_path)))
    found = kinds(compile_plan(forward, exact=exact).nodes)
    assert found == {
        "ZeroBlocksNode": 1, "CopyBlocksNode": 1, "EmbedNode": 1, "NormNode": 2 * layers + 1, "HeadsNode": layers,
        "AttentionNode": layers, "GemmNode": 3 * layers + 1, "GatherNode": 1, "SampleNode": 1, **_forms(name, layers),
    }  # fmt: skip


def _forms(name: str, layers: int) -> dict[str, int]:
    """Where a KV head's queries end inside a quantization group, the attention's output is made from whole rows."""
    model = MODELS[name]
    columns = model.num_heads // model.num_kv_heads * model.head_dim
    return {} if columns % n.GROUP == 0 else {"ElementwiseNode": layers}


def test_norms_write_the_form_that_the_matrix_reads() -> None:
    for weight_type, exact, form in (("q4_0", False, n.Q8), ("bf16", False, n.BF16), ("q4_0", True, n.F32)):
        plan = compile_plan(NETWORKS["rms_norm"].build(Maker(1, weight_type)), exact=exact)  # type: ignore[arg-type]
        norm = next(node for node in plan.nodes if isinstance(node, n.NormNode))
        assert norm.out is not None
        assert norm.out.forms == form


def test_the_last_norm_runs_on_logit_rows_only() -> None:
    plan = compile_plan(NETWORKS["positions_and_caps"].build(Maker(1, "q8_0")), exact=False)
    norm = next(node for node in plan.nodes if isinstance(node, n.NormNode))
    assert norm.out is not None
    assert norm.out.rows == "logits"


def test_weights_of_another_type_get_a_node_of_their_own() -> None:
    plan = compile_plan(NETWORKS["mixed_types"].build(Maker(1, "q4_0")), exact=False)
    heads = [node for node in plan.nodes if isinstance(node, n.HeadsNode)]
    assert [node.matrix.type for node in heads] == ["q4_0", "q8_0"]


def test_a_projection_that_is_read_twice_is_not_swallowed() -> None:
    plan = compile_plan(NETWORKS["unfused"].build(Maker(1, "q8_0")), exact=False)
    assert kinds(plan.nodes)["ElementwiseNode"] >= 5  # act, scale, gated, add, and the idle attention's scale and add


# --- refusals --------------------------------------------------------------------------------------------------------


class Parts:
    """Tensors of the networks below."""

    def __init__(self) -> None:
        maker = Maker(5, "bf16")
        self.table, self.q = maker.table(75, 64), maker.matrix(64, 64)
        self.k, self.v, self.o = maker.matrix(32, 64), maker.matrix(32, 64), maker.matrix(64, 64)
        self.norm, self.wide, self.bias = maker.vector(32), maker.vector(64), maker.vector(32)
        self.rope = RopeSpec("half", 32, np.ones(16))
        self.other_rope = RopeSpec("half", 32, np.full(16, 0.5))


Network = Callable[[Ops, Parts, Value], Value]


def _attend(ops: Ops, p: Parts, x: Value, spec: AttentionSpec = SPEC, **changed: Value) -> Value:
    q, k, v = (changed.get(name) for name in "qkv")
    q = ops.linear(x, p.q) if q is None else q
    k = ops.linear(x, p.k) if k is None else k
    return ops.attention(q, k, ops.linear(x, p.v) if v is None else v, spec, layer=0)


def _spec(**changes: Any) -> AttentionSpec:
    values: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 32, "scale": 0.2, **changes}
    return AttentionSpec(**values)


def _two_layers(ops: Ops, p: Parts, x: Value) -> Value:
    _attend(ops, p, x)
    q, k, v = ops.linear(x, p.q), ops.linear(x, p.q), ops.linear(x, p.q)
    return ops.attention(q, k, v, _spec(kv_heads=2), layer=1)


def _shared_key(ops: Ops, p: Parts, x: Value) -> Value:
    k = ops.linear(x, p.k)
    return _attend(ops, p, x, k=k, v=k)


REFUSED: dict[str, tuple[Network, str]] = {
    "no_attention": (lambda ops, p, x: x, "without attention"),
    "kv_group": (lambda ops, p, x: _attend(ops, p, x, _spec(kv_group="window")), "KV group"),
    "odd_heads": (lambda ops, p, x: _attend(ops, p, x, _spec(head_dim=24)), "24 channels"),
    "layers_differ": (_two_layers, "differ in their heads"),
    "token_types": (lambda ops, p, x: ops.embed(p.table, types=p.table), "token type"),
    "split": (lambda ops, p, x: ops.split(x, [32, 32])[0], "split"),
    "pool": (lambda ops, p, x: ops.pool(x, "mean"), "pooling"),
    "experts": (lambda ops, p, x: ops.moe(x, None, None), "mixtures of experts"),  # type: ignore[arg-type]
    "not_projected": (lambda ops, p, x: _attend(ops, p, x, q=x), "projections of its own"),
    "projection_with_residual": (
        lambda ops, p, x: _attend(ops, p, x, q=ops.linear(x, p.q, residual=x)), "projections of its own",
    ),
    "shared_projection": (_shared_key, "projections of its own"),
    "rope_outside_attention": (lambda ops, p, x: ops.rope(_attend(ops, p, x), p.rope, heads=2), "RopeOp"),
    "head_norm_outside_attention": (
        lambda ops, p, x: ops.linear(ops.norm(_attend(ops, p, x), p.norm, kind="rms", eps=1e-5, heads=2), p.o),
        "head norms",
    ),
    "norm_over_all_heads": (
        lambda ops, p, x: _attend(ops, p, x, q=ops.norm(ops.linear(x, p.q), p.wide, kind="rms", eps=1e-5)),
        "RMS over each head",
    ),
    "norm_after_rope": (
        lambda ops, p, x: _attend(ops, p, x, q=ops.norm(
            ops.rope(ops.linear(x, p.q), p.rope, heads=2), p.norm, kind="rms", eps=1e-5, heads=2)),
        "projections of its own",
    ),
    "ropes_differ": (
        lambda ops, p, x: _attend(ops, p, x, q=ops.rope(ops.linear(x, p.q), p.rope, heads=2),
                                  k=ops.rope(ops.linear(x, p.k), p.other_rope, heads=1)),
        "rotated differently",
    ),
    "values_rotated": (
        lambda ops, p, x: _attend(ops, p, x, v=ops.rope(ops.linear(x, p.v), p.rope, heads=1)), "rotated differently",
    ),
    "epsilons_differ": (
        lambda ops, p, x: _attend(ops, p, x, q=ops.norm(ops.linear(x, p.q), p.norm, kind="rms", eps=1e-5, heads=2),
                                  k=ops.norm(ops.linear(x, p.k), p.norm, kind="rms", eps=1e-6, heads=1)),
        "epsilons",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_networks_are_named(name: str) -> None:
    network, text = REFUSED[name]
    with pytest.raises(CheckpointError, match=f"CPU executor does not support .*{text}"):
        compile_plan(_whole(network), exact=False)


def _whole(network: Network) -> Forward:
    parts = Parts()
    return lambda ops: ops.logits(network(ops, parts, ops.embed(parts.table)), parts.table)


# What would be computed wrongly without a word if it were not refused.
SILENT: dict[str, Network] = {
    "only_queries_rotated": lambda ops, p, x: _attend(ops, p, x, q=ops.rope(ops.linear(x, p.q), p.rope, heads=2)),
    "only_keys_rotated": lambda ops, p, x: _attend(ops, p, x, k=ops.rope(ops.linear(x, p.k), p.rope, heads=1)),
    "values_normalized": lambda ops, p, x: _attend(
        ops, p, x, v=ops.norm(ops.linear(x, p.v), p.norm, kind="rms", eps=1e-5, heads=1)
    ),
    "head_norm_before_logits": lambda ops, p, x: ops.norm(
        ops.linear(_attend(ops, p, x), p.o), p.norm, kind="rms", eps=1e-5, heads=2
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_the_nodes_cannot_say_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="CPU executor does not support"):
        compile_plan(_whole(SILENT[name]), exact=False)


def test_a_network_without_logits_is_refused() -> None:
    parts = Parts()
    with pytest.raises(CheckpointError, match="CPU executor does not support"):
        compile_plan(lambda ops: _attend(ops, parts, ops.embed(parts.table)), exact=False)


@pytest.mark.parametrize("changed", [{"isa": "avx9000"}, {"block_size": 32}])
def test_bad_options_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints.write(MODELS["llama"], tmp_path))
    config = replace(executor_config(), **changed)
    with pytest.raises(InvalidRequest):
        cpu_executor.build(checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None)

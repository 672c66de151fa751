"""The bounds of the op tests can fail: each planted mistake is outside the loosest of them, in every run.

A mistake is made in the compiled nodes or in the bytes of the weights, between compiler and extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve.ops import nodes as n
from llmserve.ops.compiler import Plan
from llmserve.types import CheckpointTensor
from tests.ops.bounds import op_bound
from tests.ops.networks import NETWORKS, WeightType
from tests.ops.op_running import Mutation, cpu_logits, deviation, draw, executor_config, reference_logits
from tests.ops.seeds import fresh_seed

NodeT = TypeVar("NodeT", bound=n.Node)
Bytes = NDArray[np.uint8]
BLOCK_BYTES: Final = {"q4_0": 18, "q4_1": 20, "q8_0": 34}


def _gemms(plan: Plan) -> Iterator[n.GemmNode]:
    yield from (node for node in plan.nodes if isinstance(node, n.GemmNode))


def _heads(plan: Plan) -> Iterator[n.HeadsNode]:
    yield from (node for node in plan.nodes if isinstance(node, n.HeadsNode))


def _first(plan: Plan, kind: type[NodeT]) -> NodeT:
    return next(node for node in plan.nodes if isinstance(node, kind))


def _blocks(change: Callable[[Bytes], None]) -> Mutation:
    """Change the bytes of all quantized matrices: `change` gets [rows, blocks, block bytes]."""

    def mutate(plan: Plan) -> None:
        for node in _gemms(plan):
            node.matrix.tensors = [_changed(tensor, change) for tensor in node.matrix.tensors]

    return mutate


def _changed(tensor: CheckpointTensor, change: Callable[[Bytes], None]) -> CheckpointTensor:
    stored = np.frombuffer(tensor.data, np.uint8).copy()
    change(stored.reshape(tensor.shape[0], -1, BLOCK_BYTES[tensor.dtype]))
    return CheckpointTensor(tensor.name, tensor.dtype, tensor.shape, memoryview(stored.tobytes()))


def _swap_nibbles(blocks: Bytes, header: int) -> None:
    blocks[..., header:] = blocks[..., header:] << 4 | blocks[..., header:] >> 4


def _roll_header(blocks: Bytes, size: int) -> None:
    blocks[..., :size] = np.roll(blocks[..., :size], 1, axis=1)


def _flip_sign(blocks: Bytes, at: int) -> None:
    blocks[..., at] ^= 0x80


def _next_channel_scale(blocks: Bytes) -> None:
    blocks[..., :2] = np.roll(blocks[..., :2], 1, axis=0)


def _set(kind: type[Any], /, **values: Any) -> Mutation:
    """Set attributes of the first node of a kind."""

    def mutate(plan: Plan) -> None:
        node = _first(plan, kind)
        for name, value in values.items():
            setattr(node, name, value)

    return mutate


def _drop_residual(plan: Plan) -> None:
    node = next(node for node in _gemms(plan) if len(node.reads) == 2)
    node.reads = node.reads[:1]


def _drop_bias(plan: Plan) -> None:
    for node in _gemms(plan):
        node.bias = None


def _shift_bias(plan: Plan) -> None:
    for node in _gemms(plan):
        node.bias = None if node.bias is None else np.roll(node.bias, 1)


def _swap_gate_and_up(plan: Plan) -> None:
    node = next(node for node in _gemms(plan) if node.items[0][0] == n.GATED)
    pairs = zip(node.matrix.sources[0::2], node.matrix.sources[1::2], strict=True)
    node.matrix.sources = [source for gate, up in pairs for source in (up, gate)]


def _shift_rows(plan: Plan) -> None:
    """The first tile starts one row too late."""
    sources = next(node for node in _gemms(plan) if len(node.reads) == 2).matrix.sources
    tensor, row, count = sources[0]
    sources[0] = (tensor, row + 1, count - 1)


def _spec(**changes: Any) -> Mutation:
    def mutate(plan: Plan) -> None:
        node = _first(plan, n.AttentionNode)
        node.spec = replace(node.spec, **changes)

    return mutate


def _window(by: int) -> Mutation:
    def mutate(plan: Plan) -> None:
        node = _first(plan, n.AttentionNode)
        node.spec = replace(node.spec, window=node.spec.window + by)

    return mutate


def _rope(change: Callable[[Any], dict[str, Any]]) -> Mutation:
    def mutate(plan: Plan) -> None:
        for node in _heads(plan):
            assert node.rope is not None
            node.rope = replace(node.rope, **change(node.rope))

    return mutate


def _full_rotation(rope: Any) -> dict[str, Any]:
    """One frequency less is rotated."""
    return {"rotary_dim": rope.rotary_dim - 2, "inv_freq": rope.inv_freq[:-1]}


def _kinds(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Mutation:
    """Change the items of Q, K and V."""

    def mutate(plan: Plan) -> None:
        for node in _heads(plan):
            node.items = [change(item) for item in node.items]  # type: ignore[misc]

    return mutate


def _keys_and_values_swapped(item: tuple[int, ...]) -> tuple[int, ...]:
    return ({n.KEY: n.VALUE, n.VALUE: n.KEY}.get(item[0], item[0]), *item[1:])


def _other_layer(plan: Plan) -> None:
    plan.attention[1].layer = 0


@dataclass(frozen=True, slots=True)
class Mistake:
    network: str
    weight_type: WeightType
    mutate: Mutation
    exact: bool = False
    """Only the exact bound can tell this mistake from rounding."""


MISTAKES: Final = {
    "q4_0_nibbles_swapped": Mistake("head", "q4_0", _blocks(lambda b: _swap_nibbles(b, 2))),
    "q4_0_zero_point": Mistake("head", "q4_0", _blocks(lambda b: np.copyto(b[..., 2:], b[..., 2:] ^ 0x88))),
    "q4_0_scale_of_other_group": Mistake("llama_layers", "q4_0", _blocks(lambda b: _roll_header(b, 2))),
    "q4_0_scale_of_other_channel": Mistake("head", "q4_0", _blocks(_next_channel_scale)),
    "q4_1_minimum_sign": Mistake("head", "q4_1", _blocks(lambda b: _flip_sign(b, 3))),
    "q4_1_minimum_of_other_group": Mistake("llama_layers", "q4_1", _blocks(lambda b: _roll_header(b, 4))),
    "q4_1_scale_as_minimum": Mistake("head", "q4_1", _blocks(lambda b: np.copyto(b[..., 2:4], b[..., :2]))),
    "q8_0_codes_unsigned": Mistake("head", "q8_0", _blocks(lambda b: np.copyto(b[..., 2:], b[..., 2:] ^ 0x80))),
    "q8_0_lowest_bits_lost": Mistake("head", "q8_0", _blocks(lambda b: np.copyto(b[..., 2:], b[..., 2:] & 0xF0))),
    "q8_0_scale_sign": Mistake("head", "q8_0", _blocks(lambda b: _flip_sign(b, 1))),
    "rows_shifted": Mistake("linear_bias_residual", "q8_0", _shift_rows),
    "residual_missing": Mistake("linear_bias_residual", "q8_0", _drop_residual),
    "bias_missing": Mistake("linear_bias_residual", "q8_0", _drop_bias),
    "bias_shifted": Mistake("linear_bias_residual", "bf16", _shift_bias),
    "head_bias_missing": Mistake("attention_bias", "q8_0", _drop_bias),
    "norm_kind": Mistake("layer_norm", "q8_0", _set(n.NormNode, kind="rms")),
    "norm_bias_missing": Mistake("layer_norm", "q8_0", _set(n.NormNode, bias=None)),
    "norm_eps": Mistake("rms_norm", "q8_0", _set(n.NormNode, eps=3.0)),
    "gate_and_up_swapped": Mistake("gated_silu", "q8_0", _swap_gate_and_up),
    "silu_for_gelu": Mistake("gated_gelu", "q8_0", lambda plan: _retype(plan, "silu")),
    "gelu_tanh_for_gelu": Mistake("gated_gelu", "q8_0", lambda plan: _retype(plan, "gelu_tanh"), exact=True),
    "relu2_for_gelu_tanh": Mistake("gated_gelu_tanh", "q8_0", lambda plan: _retype(plan, "relu2")),
    "scale_missing": Mistake("positions_and_caps", "q8_0", lambda plan: _retune(plan, factor=1.0)),
    "softcap_missing": Mistake("positions_and_caps", "q8_0", lambda plan: _retune(plan, softcap=0.0)),
    "embedding_scale_missing": Mistake("positions_and_caps", "q8_0", _set(n.EmbedNode, factor=1.0)),
    "positions_missing": Mistake("positions_and_caps", "q8_0", _set(n.EmbedNode, positions=None)),
    "window_too_short": Mistake("attention_window", "q8_0", _window(-1)),
    "window_too_long": Mistake("attention_window", "q8_0", _window(1)),
    "window_ignored": Mistake("attention_window", "q8_0", _spec(window=0)),
    "attention_scale": Mistake("attention_window", "q8_0", _spec(scale=0.02)),
    "attention_softcap_missing": Mistake("attention_softcap", "q8_0", _spec(softcap=0.0)),
    "attention_softcap_of_another_height": Mistake("attention_softcap", "q8_0", _spec(softcap=0.8)),
    "sinks_missing": Mistake("attention_sinks", "q8_0", _spec(sinks=None)),
    "rope_style_half": Mistake("attention_rope_interleaved", "q8_0", _rope(lambda rope: {"style": "half"})),
    "rope_style_interleaved": Mistake("attention_rope_half", "q8_0", _rope(lambda rope: {"style": "interleaved"})),
    "rope_partly_ignored": Mistake("attention_rope_half_partial", "q8_0", _rope(_full_rotation)),
    "query_norm_missing": Mistake("attention_norm", "q8_0", _set(n.HeadsNode, query_norm=None)),
    "key_norm_missing": Mistake("attention_norm", "q8_0", _set(n.HeadsNode, key_norm=None)),
    "keys_and_values_swapped": Mistake("attention_bias", "q8_0", _kinds(_keys_and_values_swapped)),
    "cache_of_another_layer": Mistake("llama_layers", "q8_0", _other_layer),
}


def _retype(plan: Plan, act: Any) -> None:
    for node in _gemms(plan):
        node.act = act


def _retune(plan: Plan, **values: float) -> None:
    head = list(_gemms(plan))[-1]
    for name, value in values.items():
        setattr(head, name, value)


@pytest.mark.parametrize("name", MISTAKES)
def test_bounds_reject_the_mistake(name: str) -> None:
    mistake, seed = MISTAKES[name], fresh_seed()
    network = NETWORKS[mistake.network]
    forward, token_ids = draw(network, seed, mistake.weight_type)
    expected = reference_logits(forward, token_ids)
    loosest = op_bound("float32" if mistake.exact else "int8", gemms=network.gemms, attends=network.attends)
    config = executor_config(exact=mistake.exact)
    assert loosest.holds(deviation(cpu_logits(forward, token_ids, config), expected)), f"seed={seed}"
    found = deviation(cpu_logits(forward, token_ids, config, mistake.mutate), expected)
    assert not loosest.holds(found), f"{name} would be accepted: {found} is within {loosest}, seed={seed}"

"""Weights whose columns are stored in activation order: the input is permuted before it is quantized."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmserve.errors import CheckpointError
from llmserve.ops import nodes as n
from llmserve.ops.compiler import Plan
from llmserve.types import CheckpointTensor
from tests.ops.bounds import op_bound
from tests.ops.networks import NETWORKS, VOCAB, Maker, WeightType
from tests.ops.op_running import (
    NUM_TOKENS,
    compile_plan,
    cpu_logits,
    deviation,
    executor_config,
    reference_logits,
)
from tests.ops.running import available_isas
from tests.ops.seeds import fresh_seed


class OrderedMaker(Maker):
    """Gives every matrix but the head an order; matrices of one width share it, as those of one input do."""

    def __init__(self, seed: int, weight_type: WeightType, *, shared: bool, head: bool = False) -> None:
        super().__init__(seed, weight_type)
        self._shared, self._head = shared, head
        self._orders: dict[int, tuple[int, ...]] = {}

    def matrix(self, rows: int, columns: int) -> CheckpointTensor:
        tensor = super().matrix(rows, columns)
        if rows == VOCAB and not self._head:
            return tensor
        if not self._shared or columns not in self._orders:
            self._orders[columns] = tuple(self.random.permutation(columns).tolist())
        return replace(tensor, order=self._orders[columns])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weight_type", ["q4_0", "q4_1", "bf16"])
@pytest.mark.parametrize("name", ["two_linears", "gated_silu", "attention"])
def test_logits_agree_with_the_reference(name: str, weight_type: WeightType, shared: bool) -> None:
    network, seed = NETWORKS[name], fresh_seed()
    maker = OrderedMaker(seed, weight_type, shared=shared)
    forward = network.build(maker)
    token_ids = maker.random.integers(0, VOCAB, NUM_TOKENS).tolist()
    expected = reference_logits(forward, token_ids)
    for isa in available_isas():
        for exact in (False, True):
            kind = "float32" if exact else "bf16" if weight_type == "bf16" else "int8"
            bound = op_bound(kind, gemms=network.gemms, attends=network.attends)
            found = deviation(cpu_logits(forward, token_ids, executor_config(isa, exact=exact)), expected)
            assert bound.holds(found), f"{isa} exact={exact} seed={seed}: {found} exceeds {bound}"


def test_two_columns_exchanged_are_outside_the_bound() -> None:
    def exchange(plan: Plan) -> None:
        for node in plan.nodes:
            if isinstance(node, n.ElementwiseNode) and node.order is not None:
                node.order = (node.order[1], node.order[0], *node.order[2:])

    maker = OrderedMaker(fresh_seed(), "q4_0", shared=True)
    network = NETWORKS["two_linears"]
    forward = network.build(maker)
    token_ids = maker.random.integers(0, VOCAB, NUM_TOKENS).tolist()
    measured = cpu_logits(forward, token_ids, executor_config(), exchange)
    found = deviation(measured, reference_logits(forward, token_ids))
    assert not op_bound("int8", gemms=network.gemms, attends=network.attends).holds(found)


def test_one_permutation_serves_the_projections_of_one_input() -> None:
    forward = NETWORKS["attention"].build(OrderedMaker(fresh_seed(), "q4_0", shared=True))
    plan = compile_plan(forward, exact=False)
    orders = [node.order for node in plan.nodes if isinstance(node, n.ElementwiseNode) and node.order is not None]
    assert len(orders) == 2  # of Q, K and V together, and of the output projection
    assert sum(isinstance(node, n.HeadsNode) for node in plan.nodes) == 1


def test_a_head_with_an_order_is_refused() -> None:
    forward = NETWORKS["attention"].build(OrderedMaker(fresh_seed(), "q4_0", shared=True, head=True))
    with pytest.raises(CheckpointError, match="order"):
        compile_plan(forward, exact=False)


def test_the_reference_puts_columns_back() -> None:
    from llmserve.checkpoints.dequantize import dequantize

    maker = Maker(fresh_seed(), "q4_0")
    tensor = maker.matrix(3, 64)
    order = tuple(maker.random.permutation(64).tolist())
    ordered = dequantize(replace(tensor, order=order))
    for column, place in enumerate(order):
        np.testing.assert_array_equal(ordered[:, place], dequantize(tensor)[:, column])

"""A mixture of experts as the executor holds it: tensors brought over, codes of 4 and 8 bits kept as they are."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from llmserve.ops.cuda.moe import Experts, Router, moe
from llmserve.ops.cuda.nodes import MoeLayer
from llmserve.ops.cuda.packing import plain_codes
from llmserve.ops.cuda.stacked_weights import StackedWeights, stack_codes
from llmserve.ops.cuda.weights import DeviceWeights
from llmserve.ops.protocol import ExpertsSpec, RouterSpec
from llmserve.types import CheckpointTensor


def moe_layer(router: RouterSpec, experts: ExpertsSpec, weights: DeviceWeights) -> MoeLayer:
    """Bring one layer's router and experts over."""
    bias = None if router.choice_bias is None else weights.vector(router.choice_bias)
    device_router = Router(router, weights.vector(router.weight), bias)
    device_experts = _experts(experts, weights)

    def layer(x: Tensor) -> Tensor:
        return moe(x, device_router, device_experts)

    return layer


def _experts(spec: ExpertsSpec, weights: DeviceWeights) -> Experts:
    gate, up, down = (_stacked(tensor, weights) for tensor in (spec.gate, spec.up, spec.down))
    shared_gate = None if spec.shared_gate is None else weights.vector(spec.shared_gate).reshape(-1)
    shared = None if spec.shared is None else _experts(spec.shared, weights)
    return Experts(gate, up, down, spec.act, shared, shared_gate)


def _stacked(tensor: CheckpointTensor, weights: DeviceWeights) -> StackedWeights:
    """Codes where the type has some, else bfloat16."""
    experts, outputs, inputs = tensor.shape
    plain = plain_codes(replace(tensor, shape=(experts * outputs, inputs))) if tensor.order is None else None
    if plain is None:
        return StackedWeights(weights.matrix(tensor))
    weights.was_read(tensor)
    groups = experts, outputs, plain.scales.shape[1]
    biases = None if plain.biases is None else plain.biases.reshape(groups)
    codes = plain.codes.reshape(tensor.shape)
    stacked = stack_codes(codes, plain.bits, plain.scales.reshape(groups), biases, weights.device)
    parts = (stacked.values, stacked.scales, stacked.biases)
    weights.num_bytes += sum(part.nbytes for part in parts if part is not None)
    return stacked

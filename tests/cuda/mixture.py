"""Mixtures of experts for tests: random weights, the reference in float64, and what rounding may differ by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, device

from llmserve.ops import reference_math, reference_moe
from llmserve.ops.cuda.moe import Experts, Router
from llmserve.ops.cuda.stacked_weights import StackedWeights, stack_codes
from llmserve.ops.protocol import ActKind, ExpertsSpec, RouterSpec
from llmserve.types import CheckpointTensor

Floats = NDArray[np.float64]
UNIT: Final = 2.0**-8
"""Half a unit in the last place of bfloat16, relative."""


def named(name: str, rows: int = 1) -> CheckpointTensor:
    """Stands for the array `Mixture.arrays[name]`; its first axis is all that is asked of it."""
    return CheckpointTensor(name=name, dtype="f32", shape=(rows,), data=memoryview(b""))


@dataclass(slots=True)
class Mixture:
    """Specs for the reference with their arrays in float64, and the same on the device."""

    spec: RouterSpec
    experts_spec: ExpertsSpec
    router: Router
    experts: Experts
    arrays: dict[str, Any] = field(default_factory=dict)

    def expected(self, x: Tensor) -> Floats:
        """The reference's experts for x, with the choice by the same float32 logits as on the device."""
        values = x.double().cpu().numpy()
        chosen, mixing = reference_moe.route(values, self.spec, self._weights)
        return np.asarray(reference_moe.experts(values, chosen, mixing, self.experts_spec, self._weights))

    def allowance(self, x: Tensor) -> Floats:
        """How far rounding may lead: of `inner`, of what an expert yields, and of the sum, each half a unit.

        `sum |weight| (sum |down| |inner| + |part|) + |y|`, which is the reference run on magnitudes. What float32 adds
        is a thousandth of it.
        """
        values = x.double().cpu().numpy()
        chosen, mixing = reference_moe.route(values, self.spec, self._weights)
        total = self._magnitude(values, chosen, mixing, self.experts_spec)
        if self.experts_spec.shared is not None:
            everyone = np.tile(np.arange(self.experts_spec.shared.gate.shape[0]), (len(values), 1))
            total = total + self._magnitude(values, everyone, np.ones(everyone.shape), self.experts_spec.shared)
        return np.asarray(UNIT * 1.01 * (2 * total + np.abs(self.expected(x)))) + 1e-6

    def _magnitude(self, x: Floats, chosen: NDArray[np.int64], mixing: NDArray[Any], spec: ExpertsSpec) -> Floats:
        gate, up, down = (self.arrays[tensor.name] for tensor in (spec.gate, spec.up, spec.down))
        y = np.zeros_like(x)
        for token, row in enumerate(x):
            for expert, weight in zip(chosen[token], mixing[token], strict=True):
                gates = gate[expert] @ row
                inner = reference_math.act(gates, spec.act) * (up[expert] @ row)
                y[token] += abs(weight) * (np.abs(down[expert]) @ np.abs(inner))
        return y

    def _weights(self, tensor: CheckpointTensor) -> Any:
        return self.arrays[tensor.name]


Maker = Callable[[np.random.Generator, tuple[int, int, int], device], tuple[StackedWeights, Floats]]


def dense(random: np.random.Generator, shape: tuple[int, int, int], on: device) -> tuple[StackedWeights, Floats]:
    """Random bfloat16 weights between poisoned rows, and their values."""
    experts, columns, depth = shape
    memory = torch.full((experts, columns + 1, depth + 8), float("nan"), dtype=torch.bfloat16)
    view = memory[:, :columns, :depth]
    view.copy_(torch.from_numpy(random.standard_normal(shape) / depth**0.5))
    values = view.double().numpy().copy()
    return StackedWeights(memory.to(on)[:, :columns, :depth]), values


def coded(bits: int, group: int, *, biased: bool) -> Maker:
    """Random codes; a group of 0 is a whole row."""

    def make(random: np.random.Generator, shape: tuple[int, int, int], on: device) -> tuple[StackedWeights, Floats]:
        experts, columns, depth = shape
        codes = random.integers(0, 2**bits, shape, dtype=np.uint8)
        groups = depth // group if group else 1
        sizes = (experts, columns, groups)
        dtype = np.float16 if random.integers(2) else np.float32
        scales = (random.uniform(0.5, 1.5, sizes) / (2 ** (bits - 2) * depth**0.5)).astype(dtype)
        biases = (random.standard_normal(sizes) / depth**0.5).astype(dtype) if biased else None
        signed = codes.view(np.int8) if bits == 8 else codes.astype(np.int8)
        numbers = signed.astype(np.float64) - (8 if bits == 4 and biases is None else 0)
        values = np.repeat(scales, depth // groups, axis=-1) * numbers
        if biases is not None:
            values += np.repeat(biases, depth // groups, axis=-1)
        return stack_codes(codes, bits, scales, biases, on), values

    return make


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a mixture."""

    hidden: int = 72
    columns: int = 40
    experts: int = 4
    top_k: int = 2
    act: ActKind = "silu"
    shared: int = 0
    shared_gate: bool = False
    shared_columns: int = 24


def build(random: np.random.Generator, sizes: Sizes, on: device, *, make: Maker = dense, **options: Any) -> Mixture:
    """Random weights. `options` are RouterSpec's; `choice_bias=True` draws one."""
    arrays: dict[str, Any] = {"router": random.integers(-8, 9, (sizes.experts, sizes.hidden)) / 8.0}
    bias = None
    if options.pop("choice_bias", False):
        arrays["bias"] = random.integers(-8, 9, sizes.experts) / 16.0
        bias = named("bias")
    spec = RouterSpec(named("router"), sizes.experts, sizes.top_k, choice_bias=bias, **options)
    router = Router(
        spec,
        torch.from_numpy(arrays["router"]).float().to(on),
        None if bias is None else torch.from_numpy(arrays["bias"]).float().to(on),
    )
    experts, experts_spec = _experts(random, sizes, sizes.experts, sizes.columns, on, make, arrays, "")
    if sizes.shared:
        shared, shared_spec = _experts(random, sizes, sizes.shared, sizes.shared_columns, on, make, arrays, "shared.")
        gate = gate_spec = None
        if sizes.shared_gate:
            arrays["shared_gate"] = random.standard_normal(sizes.hidden).astype(np.float32).astype(np.float64)
            gate, gate_spec = torch.from_numpy(arrays["shared_gate"]).float().to(on), named("shared_gate")
        experts = replace(experts, shared=shared, shared_gate=gate)
        experts_spec = replace(experts_spec, shared=shared_spec, shared_gate=gate_spec)
    return Mixture(spec, experts_spec, router, experts, arrays)


def _experts(
    random: np.random.Generator, sizes: Sizes, count: int, columns: int, on: device, make: Maker,
    arrays: dict[str, Any], prefix: str,
) -> tuple[Experts, ExpertsSpec]:  # fmt: skip
    shapes = {
        "gate": (count, columns, sizes.hidden),
        "up": (count, columns, sizes.hidden),
        "down": (count, sizes.hidden, columns),
    }
    made = {}
    for name, shape in shapes.items():
        made[name], arrays[prefix + name] = make(random, shape, on)
    names = {name: named(prefix + name, count) for name in shapes}
    experts = Experts(made["gate"], made["up"], made["down"], sizes.act)
    return experts, ExpertsSpec(names["gate"], names["up"], names["down"], sizes.act)


def tokens(random: np.random.Generator, count: int, hidden: int, on: device) -> Tensor:
    """Rows between poisoned ones. Values are eighths: products with the router's are exact, so ties are ties."""
    memory = torch.full((count, hidden + 24), float("nan"), dtype=torch.bfloat16)
    memory[:, :hidden] = torch.from_numpy(random.integers(-16, 17, (count, hidden)) / 8.0)
    return memory.to(on)[:, :hidden]

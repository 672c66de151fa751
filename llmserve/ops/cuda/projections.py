"""Projections on the device, by how their weights are stored, and the loader that chooses.

bfloat16 weights go through cuBLAS, or where results may not depend on the batch through our own kernel; weights of 4
and 8 bits through our own kernels, packed (`packing`); int8 weights with one scale per channel meet int8 activations.
What has no packed form is dequantized to bfloat16 once, when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmserve.checkpoints.dequantize import dequantize
from llmserve.errors import CheckpointError
from llmserve.ops.cuda.int8_linear import MOST_INPUTS
from llmserve.ops.cuda.launchers import Launchers
from llmserve.ops.cuda.linear import Workspace, make_workspace
from llmserve.ops.cuda.packing import STRIP, STRIPS, concatenate, pack
from llmserve.ops.cuda.quantized_linear import QuantizedWeight, to_device
from llmserve.ops.cuda.weights import DTYPE, DeviceWeights, row_pieces
from llmserve.types import CheckpointTensor

MOST_TILED_ROWS: Final = 256
"""With more rows it is faster to dequantize the weights and let cuBLAS multiply."""
_WORKSPACE_BYTES: Final = 32 << 20
_PACKED_ROWS: Final = 32 * STRIP * STRIPS
"""Of a weight that one thread packs at a time: whole pairs of strips."""


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations in int8 with a scale for each row."""

    values: Tensor  # int8 [rows, columns]
    scales: Tensor  # float32 [rows]

    @classmethod
    def of_shape(cls, shape: tuple[int, int] | torch.Size, device: torch.device) -> QuantizedRows:
        """Memory for them."""
        return cls(torch.empty(shape, dtype=torch.int8, device=device), torch.empty(shape[0], device=device))


Rows: TypeAlias = Tensor | QuantizedRows
"""[num_rows, columns], bfloat16, or int8 with a scale each."""


class Projection(Protocol):
    """`x @ weight.T + bias`."""

    def __call__(self, launchers: Launchers, x: Rows) -> Tensor:
        """bfloat16 [rows, outputs]."""

    def floats(self, launchers: Launchers, x: Rows) -> Tensor:
        """float32 [rows, outputs]."""

    def add_to(self, launchers: Launchers, x: Rows, stream: Tensor) -> None:
        """Adds to the residual stream, float32 [rows, outputs], in place."""


@dataclass(frozen=True, slots=True)
class DenseProjection:
    """bfloat16 weights, multiplied by cuBLAS through torch."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None  # float32

    def __call__(self, launchers: Launchers, x: Rows) -> Tensor:
        return F.linear(operand(x), self.weight, None if self.bias is None else self.bias.to(DTYPE))

    def floats(self, launchers: Launchers, x: Rows) -> Tensor:
        x = operand(x)
        if x.is_cuda:
            y = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        else:
            y = F.linear(x.float(), self.weight.float())
        return y if self.bias is None else y + self.bias

    def add_to(self, launchers: Launchers, x: Rows, stream: Tensor) -> None:
        stream += self(launchers, x)


@dataclass(frozen=True, slots=True)
class KernelProjection:
    """Weights that only our own kernels multiply. They add a bias and the residual stream before they round."""

    outputs: int
    bias: Tensor | None  # float32
    workspace: Workspace

    def __call__(self, launchers: Launchers, x: Rows) -> Tensor:
        return self._new(launchers, x, DTYPE)

    def floats(self, launchers: Launchers, x: Rows) -> Tensor:
        return self._new(launchers, x, torch.float32)

    def add_to(self, launchers: Launchers, x: Rows, stream: Tensor) -> None:
        self._multiply(launchers, x, stream, residual=stream)

    def _new(self, launchers: Launchers, x: Rows, dtype: torch.dtype) -> Tensor:
        values = x.values if isinstance(x, QuantizedRows) else x
        out = torch.empty((len(values), self.outputs), dtype=dtype, device=values.device)
        self._multiply(launchers, x, out, residual=None)
        return out

    def _multiply(self, launchers: Launchers, x: Rows, out: Tensor, *, residual: Tensor | None) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class FixedProjection(KernelProjection):
    """bfloat16 weights: a row's result does not depend on the others."""

    weight: Tensor

    def _multiply(self, launchers: Launchers, x: Rows, out: Tensor, *, residual: Tensor | None) -> None:
        launchers.fixed_linear(
            operand(x), self.weight, out, workspace=self.workspace, bias=self.bias, residual=residual
        )


@dataclass(frozen=True, slots=True)
class QuantizedProjection(KernelProjection):
    """Packed weights of 4 or 8 bits."""

    weight: QuantizedWeight
    deterministic: bool

    def _multiply(self, launchers: Launchers, x: Rows, out: Tensor, *, residual: Tensor | None) -> None:
        rows = self._ordered(launchers, operand(x))
        if len(rows) <= MOST_TILED_ROWS or self.deterministic:
            launchers.quantized_linear(
                rows, self.weight, out, workspace=self.workspace, bias=self.bias, residual=residual
            )
            return
        matrix = torch.empty((self.weight.outputs, self.weight.inputs), dtype=DTYPE, device=rows.device)
        launchers.dequantize(self.weight, matrix)
        if residual is not None:
            DenseProjection(matrix, self.bias).add_to(launchers, rows, residual)
        else:
            self._multiply_dense(rows, matrix, out)

    def _multiply_dense(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        """Into `out` itself: of a long prompt it is the largest thing there is."""
        if out.dtype == DTYPE:
            torch.mm(x, matrix.T, out=out)
        elif x.is_cuda:
            torch.mm(x, matrix.T, out_dtype=torch.float32, out=out)
        else:
            torch.mm(x.float(), matrix.float().T, out=out)
        if self.bias is not None:
            out += self.bias

    def _ordered(self, launchers: Launchers, x: Tensor) -> Tensor:
        if self.weight.order is None:
            return x
        ordered = torch.empty_like(x, memory_format=torch.contiguous_format)
        launchers.gather_columns(x, self.weight.order, ordered)
        return ordered


@dataclass(frozen=True, slots=True)
class Int8Projection(KernelProjection):
    """int8 weights with a scale per output channel; activations become int8 with a scale per row."""

    weight: QuantizedWeight

    def _multiply(self, launchers: Launchers, x: Rows, out: Tensor, *, residual: Tensor | None) -> None:
        rows = self._quantized(launchers, x)
        launchers.int8_linear(
            rows.values, rows.scales, self.weight, out, workspace=self.workspace, bias=self.bias, residual=residual
        )

    def _quantized(self, launchers: Launchers, x: Rows) -> QuantizedRows:
        if isinstance(x, QuantizedRows):
            return x
        values = operand(x)
        rows = QuantizedRows.of_shape(values.shape, values.device)
        launchers.quantize_rows(values, rows.values, rows.scales)
        return rows


def operand(x: Rows) -> Tensor:
    """What bfloat16 weights meet: the residual stream itself is rounded first."""
    assert isinstance(x, Tensor), "lowering quantizes only what int8 projections read"
    return x if x.dtype == DTYPE else x.to(DTYPE)


class ProjectionLoader:
    """Brings weights over in the form their quantization asks for."""

    def __init__(self, weights: DeviceWeights, *, deterministic: bool) -> None:
        self._weights = weights
        self._deterministic = deterministic
        self._workspace = make_workspace(_WORKSPACE_BYTES, weights.device)
        self._packers = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "pack")

    def is_int8(self, weight: CheckpointTensor) -> bool:
        """Whether the projection reads int8 rows."""
        inputs = weight.shape[1]
        return weight.dtype == "i8" and weight.order is None and inputs % 16 == 0 and inputs <= MOST_INPUTS

    def fit_together(self, weights: Sequence[CheckpointTensor]) -> bool:
        """Whether the outputs of these can be one projection's."""
        if len({(_form(weight), weight.order) for weight in weights}) > 1:
            return False
        # Packed strips come in pairs: other numbers of outputs would have gaps between them.
        return _form(weights[0]) == "dense" or all(weight.shape[0] % (STRIP * STRIPS) == 0 for weight in weights[:-1])

    def load(self, weights: Sequence[CheckpointTensor], biases: Sequence[CheckpointTensor | None]) -> Projection:
        """The projection to the outputs of all, one after the other."""
        bias = self._bias(weights, biases)
        packed = self._packed(weights)
        if packed is not None and self.is_int8(weights[0]):
            return Int8Projection(packed.outputs, bias, self._workspace, packed)
        if packed is not None:
            return QuantizedProjection(packed.outputs, bias, self._workspace, packed, self._deterministic)
        if self._deterministic and weights[0].shape[1] % 8:
            width = weights[0].shape[1]
            raise CheckpointError(f"{weights[0].name}: {width} columns; deterministic products take a multiple of 8")
        dense = self._weights.rows(weights)
        if self._deterministic:
            return FixedProjection(len(dense), bias, self._workspace, dense)
        return DenseProjection(dense, bias)

    def _bias(self, weights: Sequence[CheckpointTensor], biases: Sequence[CheckpointTensor | None]) -> Tensor | None:
        """float32, zeros where only others have one."""
        if all(bias is None for bias in biases):
            return None
        parts = [
            np.zeros(weight.shape[0], np.float32) if bias is None else dequantize(bias).reshape(-1)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return self._weights.keep(np.concatenate(parts))

    def _packed(self, weights: Sequence[CheckpointTensor]) -> QuantizedWeight | None:
        if _form(weights[0]) == "dense":
            return None
        pieces = [piece for weight in weights for _, piece in row_pieces(weight, _PACKED_ROWS * weight.shape[1])]
        found = list(self._packers.map(pack, pieces))
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        for weight in weights:
            self._weights.was_read(weight)
        packed = to_device(parts[0] if len(parts) == 1 else concatenate(parts), self._weights.device)
        tensors = (packed.codes, packed.scales, packed.biases, packed.order)
        self._weights.num_bytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return packed


def _form(weight: CheckpointTensor) -> str:
    """What weights of one projection have in common: their quantization, or that they have none."""
    return "dense" if weight.dtype in ("f32", "f16", "bf16") else weight.dtype

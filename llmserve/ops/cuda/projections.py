"""Projections on the device, by how their weights are stored, and the loader that chooses.

bfloat16 weights go through cuBLAS, or where results may not depend on the batch through our own kernel; weights of 4
and 8 bits through our own kernels, packed (`packing`); int8 weights with one scale per channel meet int8 activations.
What has no packed form is dequantized to bfloat16 once, when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmserve.checkpoints.dequantize import dequantize
from llmserve.ops.cuda.int8_linear import MOST_INPUTS
from llmserve.ops.cuda.launchers import Launchers
from llmserve.ops.cuda.linear import Workspace, make_workspace
from llmserve.ops.cuda.packing import STRIP, STRIPS, PackedWeight, concatenate, pack
from llmserve.ops.cuda.quantized_linear import QuantizedWeight, to_device
from llmserve.ops.cuda.weights import DTYPE, DeviceWeights
from llmserve.types import CheckpointTensor

MOST_TILED_ROWS: Final = 256
"""With more rows it is faster to dequantize the weights and let cuBLAS multiply."""
_WORKSPACE_BYTES: Final = 32 << 20


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

    def __call__(
        self, launchers: Launchers, x: Rows, *, residual: Tensor | None = None, may_overwrite: bool = False
    ) -> Tensor:
        """bfloat16 [rows, outputs], plus the residual, whose memory may be taken where `may_overwrite`."""

    def logits(self, launchers: Launchers, x: Rows) -> Tensor:
        """The same in float32."""


def _out(x: Tensor, outputs: int, residual: Tensor | None, *, may_overwrite: bool) -> Tensor:
    """Where a kernel writes that may write over its residual."""
    if residual is not None and may_overwrite:
        return residual
    return torch.empty((len(x), outputs), dtype=DTYPE, device=x.device)


@dataclass(frozen=True, slots=True)
class DenseProjection:
    """bfloat16 weights, multiplied by cuBLAS through torch."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None  # bfloat16

    def __call__(
        self, launchers: Launchers, x: Rows, *, residual: Tensor | None = None, may_overwrite: bool = False
    ) -> Tensor:
        assert isinstance(x, Tensor)
        if residual is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is not None:
            return F.linear(x, self.weight, self.bias) + residual
        return residual.addmm_(x, self.weight.T) if may_overwrite else torch.addmm(residual, x, self.weight.T)

    def logits(self, launchers: Launchers, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        # Rounded to bfloat16 logits would be an eighth apart where they matter.
        if x.is_cuda:
            return torch.mm(x, self.weight.T, out_dtype=torch.float32)
        return F.linear(x.float(), self.weight.float())


@dataclass(frozen=True, slots=True)
class FixedProjection:
    """bfloat16 weights, multiplied by our own kernel: a row's result does not depend on the others."""

    weight: Tensor
    bias: Tensor | None  # float32
    workspace: Workspace

    def __call__(
        self, launchers: Launchers, x: Rows, *, residual: Tensor | None = None, may_overwrite: bool = False
    ) -> Tensor:
        assert isinstance(x, Tensor)
        out = _out(x, len(self.weight), residual, may_overwrite=may_overwrite)
        launchers.fixed_linear(x, self.weight, out, workspace=self.workspace, bias=self.bias, residual=residual)
        return out

    def logits(self, launchers: Launchers, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        out = torch.empty((len(x), len(self.weight)), device=x.device)
        launchers.fixed_linear(x, self.weight, out, workspace=self.workspace)
        return out


@dataclass(frozen=True, slots=True)
class QuantizedProjection:
    """Packed weights of 4 or 8 bits."""

    weight: QuantizedWeight
    bias: Tensor | None  # float32
    workspace: Workspace
    deterministic: bool

    def __call__(
        self, launchers: Launchers, x: Rows, *, residual: Tensor | None = None, may_overwrite: bool = False
    ) -> Tensor:
        x = self._ordered(launchers, x)
        if len(x) > MOST_TILED_ROWS and not self.deterministic:
            return self._dequantized(launchers)(launchers, x, residual=residual, may_overwrite=may_overwrite)
        out = _out(x, self.weight.outputs, residual, may_overwrite=may_overwrite)
        launchers.quantized_linear(x, self.weight, out, workspace=self.workspace, bias=self.bias, residual=residual)
        return out

    def logits(self, launchers: Launchers, x: Rows) -> Tensor:
        x = self._ordered(launchers, x)
        if len(x) > MOST_TILED_ROWS and not self.deterministic:
            return self._dequantized(launchers).logits(launchers, x)
        out = torch.empty((len(x), self.weight.outputs), device=x.device)
        launchers.quantized_linear(x, self.weight, out, workspace=self.workspace)
        return out

    def _ordered(self, launchers: Launchers, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        if self.weight.order is None:
            return x
        ordered = torch.empty_like(x, memory_format=torch.contiguous_format)
        launchers.gather_columns(x, self.weight.order, ordered)
        return ordered

    def _dequantized(self, launchers: Launchers) -> DenseProjection:
        """For one call: what cuBLAS multiplies."""
        dense = torch.empty((self.weight.outputs, self.weight.inputs), dtype=DTYPE, device=self.weight.codes.device)
        launchers.dequantize(self.weight, dense)
        return DenseProjection(dense, None if self.bias is None else self.bias.to(DTYPE))


@dataclass(frozen=True, slots=True)
class Int8Projection:
    """int8 weights with a scale per output channel; activations become int8 with a scale per row."""

    weight: QuantizedWeight
    bias: Tensor | None  # float32
    workspace: Workspace

    def __call__(
        self, launchers: Launchers, x: Rows, *, residual: Tensor | None = None, may_overwrite: bool = False
    ) -> Tensor:
        rows = self._quantized(launchers, x)
        out = _out(rows.values, self.weight.outputs, residual, may_overwrite=may_overwrite)
        launchers.int8_linear(
            rows.values, rows.scales, self.weight, out, workspace=self.workspace, bias=self.bias, residual=residual
        )
        return out

    def logits(self, launchers: Launchers, x: Rows) -> Tensor:
        rows = self._quantized(launchers, x)
        out = torch.empty((len(rows.values), self.weight.outputs), device=rows.values.device)
        launchers.int8_linear(rows.values, rows.scales, self.weight, out, workspace=self.workspace)
        return out

    def _quantized(self, launchers: Launchers, x: Rows) -> QuantizedRows:
        if isinstance(x, QuantizedRows):
            return x
        rows = QuantizedRows.of_shape(x.shape, x.device)
        launchers.quantize_rows(x, rows.values, rows.scales)
        return rows


class ProjectionLoader:
    """Brings weights over in the form their quantization asks for."""

    def __init__(self, weights: DeviceWeights, *, deterministic: bool) -> None:
        self._weights = weights
        self._deterministic = deterministic
        self._workspace = make_workspace(_WORKSPACE_BYTES, weights.device)

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
            return Int8Projection(packed, bias, self._workspace)
        if packed is not None:
            return QuantizedProjection(packed, bias, self._workspace, self._deterministic)
        dense = self._weights.rows(weights)
        if self._deterministic:
            return FixedProjection(dense, bias, self._workspace)
        return DenseProjection(dense, None if bias is None else bias.to(DTYPE))

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
        parts: list[PackedWeight] = []
        for weight in weights:
            part = pack(weight)
            if part is None:
                return None
            parts.append(part)
            self._weights.was_read(weight)
        packed = to_device(parts[0] if len(parts) == 1 else concatenate(parts), self._weights.device)
        tensors = (packed.codes, packed.scales, packed.biases, packed.order)
        self._weights.num_bytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return packed


def _form(weight: CheckpointTensor) -> str:
    """What weights of one projection have in common: their quantization, or that they have none."""
    return "dense" if weight.dtype in ("f32", "f16", "bf16") else weight.dtype

"""Linear layers: which kernel, or which product of torch, for how many rows.

Invariant: deterministic layers give a row the same bits in every batch, so they never ask torch, whose libraries choose
by the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llmserve.ops.cuda import fixed_linear, int8_linear, quantized_linear
from llmserve.ops.cuda.launchers import Launchers
from llmserve.ops.cuda.linear import Workspace
from llmserve.ops.cuda.quantized_linear import QuantizedWeight

MOST_PACKED_ROWS: Final = 256
"""With more, products of torch are so much faster that they pay for weights in bfloat16 made for each call."""


@dataclass(frozen=True, slots=True)
class LinearLayers:
    """The linear layers of one stream. All write `x W^T + bias + residual` to `out`."""

    launchers: Launchers
    workspace: Workspace
    is_deterministic: bool

    def quantized(
        self,
        x: Tensor,
        weight: QuantizedWeight,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """As `QuantizedLinear`, x in the order of the layer's inputs. Many rows meet weights rounded to bfloat16."""
        x = self._in_order(x, weight)
        if self.is_deterministic or len(x) <= MOST_PACKED_ROWS or out.dtype != torch.bfloat16:
            self.launchers.quantized_linear(x, weight, out, workspace=self.workspace, bias=bias, residual=residual)
            return
        quantized_linear.check_arguments(x, weight, out, workspace=self.workspace, bias=bias, residual=residual)
        matrix = torch.empty((weight.outputs, weight.inputs), dtype=torch.bfloat16, device=x.device)
        self.launchers.dequantize(weight, matrix)
        _product(x, matrix, out, bias, residual)

    def int8(
        self,
        x: Tensor,
        weight: QuantizedWeight,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """As `quantized`, with the rows of x, bfloat16, rounded to int8; for weights that `int8_linear.takes`."""
        if not int8_linear.takes(weight):
            raise ValueError("weight: is not of the kind that is multiplied as integers")
        x = self._in_order(x, weight)
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scales = torch.empty(len(x), device=x.device)
        self.launchers.quantize_rows(x, codes, scales)
        self.launchers.int8_linear(codes, scales, weight, out, workspace=self.workspace, bias=bias, residual=residual)

    def dense(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """As `FixedLinear`; by torch where the same bits are not asked for."""
        if self.is_deterministic or out.dtype != torch.bfloat16:
            self.launchers.fixed_linear(x, weight, out, workspace=self.workspace, bias=bias, residual=residual)
            return
        fixed_linear.check_arguments(x, weight, out, workspace=self.workspace, bias=bias, residual=residual)
        _product(x, weight, out, bias, residual)

    def _in_order(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        if weight.order is None:
            return x
        ordered = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.launchers.gather_columns(x, weight.order, ordered)
        return ordered


def _product(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """In bfloat16: the residual is added to the float32 sums, a bias to the rounded ones."""
    if residual is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(residual, x, weight.T, out=out)
    if bias is not None:
        out.copy_(out.float() + bias)

"""Packed linear layers in torch: float32 products of exact weights."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.linear import Workspace
from llmserve.ops.cuda.packing import PackedWeight, unpack
from llmserve.ops.cuda.quantized_linear import QuantizedWeight, check_arguments


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    out: Tensor,
    *,
    workspace: Workspace,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    check_arguments(x, weight, out, workspace=workspace, bias=bias, residual=residual)
    finish(by_rows(x.float(), values_of(weight)), out, bias, residual)


def values_of(weight: QuantizedWeight) -> Tensor:
    """float32 [outputs, inputs]."""
    packed = PackedWeight(
        bits=weight.bits,
        group=weight.group,
        outputs=weight.outputs,
        inputs=weight.inputs,
        codes=weight.codes.numpy(),
        scales=weight.scales.numpy(),
        biases=None if weight.biases is None else weight.biases.numpy(),
        order=None,
    )
    return torch.from_numpy(unpack(packed))


def by_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T row by row: a product of torch may sum a row in another order when there are others."""
    rows = [weight @ row for row in x]
    return torch.stack(rows) if rows else x.new_empty((0, weight.shape[0]))


def finish(sums: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Adds in float32 and rounds once."""
    if bias is not None:
        sums = sums + bias
    if residual is not None:
        sums = sums + residual.float()
    out.copy_(sums.to(out.dtype))

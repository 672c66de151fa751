"""Linear layers of int8 in torch: sums of integers, float64 holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.int8_linear import check_arguments
from llmserve.ops.cuda.linear import Workspace
from llmserve.ops.cuda.packing import PackedWeight, unpack
from llmserve.ops.cuda.quantized_linear import QuantizedWeight
from tests.cuda.emulation.quantized_linear import finish


def int8_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: QuantizedWeight,
    out: Tensor,
    *,
    workspace: Workspace,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    check_arguments(x, x_scales, weight, out, workspace=workspace, bias=bias, residual=residual)
    scales = weight.scales.numpy()
    packed = PackedWeight(
        bits=8,
        group=0,
        outputs=weight.outputs,
        inputs=weight.inputs,
        codes=weight.codes.numpy(),
        scales=scales * 0 + 1,
        biases=None,
        order=None,
    )
    by_channel = torch.from_numpy(scales.transpose(0, 3, 2, 1).reshape(-1)[: weight.outputs].copy())
    sums = (x.double() @ torch.from_numpy(unpack(packed)).double().T).float()
    finish(sums * by_channel * x_scales[:, None], out, bias, residual)

"""Layer norm in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.layer_norm import check_arguments
from tests.cuda.emulation.quantize import store_rows
from tests.cuda.emulation.rms_norm import add_residual


def layer_norm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    check_arguments(x, weight, out, bias, residual, scales)
    values = add_residual(x, residual).float()
    values = values - values.mean(-1, keepdim=True)
    y = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight
    store_rows(y if bias is None else y + bias, out, scales)

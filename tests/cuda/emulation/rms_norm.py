"""RMS norm in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.rms_norm import check_arguments
from tests.cuda.emulation.quantize import store_rows


def rms_norm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    check_arguments(x, weight, out, residual, scales)
    values = add_residual(x, residual).float()
    store_rows(values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight, out, scales)


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """What is normalized; the residual stream becomes it."""
    if residual is None:
        return x
    residual += x.float()
    return residual

"""RMS norm in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.rms_norm import check_arguments


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float, residual: Tensor | None = None) -> None:
    check_arguments(x, weight, out, residual)
    summed = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    if residual is not None:
        residual.copy_(summed)
    values = summed.float()
    out.copy_((values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype))

"""The launchers in torch, of the same signatures and arithmetic: whole networks run without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda_library import check_rms_norm


class TorchLaunchers:
    """On the CPU."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0
        """Kernels launched so far: that they are used at all."""

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor, *, eps: float, residual: Tensor | None = None) -> None:
        check_rms_norm(x, weight, out, residual)
        self.calls += 1
        summed = x if residual is None else (x.float() + residual.float()).to(x.dtype)
        if residual is not None:
            residual.copy_(summed)
        values = summed.float()
        out.copy_((values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype))

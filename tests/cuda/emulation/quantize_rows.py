"""Rows to int8 in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.ops.cuda.quantize_rows import check_arguments


def quantize_rows(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    check_arguments(x, codes, scales)
    if x.numel() == 0:
        return
    values = x.float()
    scales.copy_(values.abs().amax(1) / 127)
    divisors = torch.where(scales == 0, 1, scales)
    codes.copy_((values / divisors[:, None]).round().nan_to_num(0).clamp(-127, 127).to(torch.int8))

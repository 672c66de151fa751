"""Activation functions in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmserve.ops.cuda.act import check_arguments, is_gated
from llmserve.ops.protocol import ActKind
from tests.cuda.emulation.quantize import store_rows


def act(x: Tensor, out: Tensor, *, kind: ActKind, scales: Tensor | None = None) -> None:
    check_arguments(x, out, kind, scales)
    values = x.float()
    gate, up = values.chunk(2, -1) if is_gated(x, out) else (values, None)
    if kind == "relu2":
        y = F.relu(gate).square()
    elif kind == "silu":
        y = F.silu(gate)
    else:
        y = F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    store_rows(y if up is None else y * up, out, scales)

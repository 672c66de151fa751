"""Linear layers of bfloat16 in torch, row by row."""

from __future__ import annotations

from torch import Tensor

from llmserve.ops.cuda.fixed_linear import check_arguments
from llmserve.ops.cuda.linear import Workspace
from tests.cuda.emulation.quantized_linear import by_rows, finish


def fixed_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    workspace: Workspace,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    check_arguments(x, weight, out, workspace=workspace, bias=bias, residual=residual)
    finish(by_rows(x.float(), weight.float()), out, bias, residual)

"""Columns in another order in torch."""

from __future__ import annotations

from torch import Tensor

from llmserve.ops.cuda.gather_columns import check_arguments


def gather_columns(x: Tensor, order: Tensor, out: Tensor) -> None:
    check_arguments(x, order, out)
    out.copy_(x[:, order.long()])

"""Embedding in torch."""

from __future__ import annotations

from torch import Tensor

from llmserve.ops.cuda.embed import check_arguments


def embed(
    ids: Tensor,
    table: Tensor,
    out: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    type_row: Tensor | None = None,
) -> None:
    check_arguments(ids, table, out, positions, position_table, type_row)
    rows = table[ids.long()].float() * scale
    if positions is not None and position_table is not None:
        rows = rows + position_table[positions.long()].float()
    out.copy_((rows if type_row is None else rows + type_row.float()).to(out.dtype))

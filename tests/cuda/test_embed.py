"""Embedding by every kind of launchers against float64: scale, position and type rows, strides, guard zones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from llmserve.ops.cuda.launchers import Launchers

from tests.cuda.rows import BF16, SLACK, guarded, is_untouched_around  # noqa: E402

SHAPES: Final = ((1, 8), (7, 64), (3, 1000), (2, 4104), (5, 7), (1, 1))
VOCAB: Final = 50
NUM_POSITIONS: Final = 20


class Drawn:
    """The tables of one case, and ids that take first and last rows."""

    def __init__(self, rows: int, columns: int, launchers: Launchers) -> None:
        random = torch.Generator().manual_seed(fresh_seed())

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(torch.bfloat16).to(launchers.device)

        def ids(below: int) -> Tensor:
            drawn = torch.randint(0, below, (rows,), generator=random, dtype=torch.int32)
            drawn[0] = below - 1
            drawn[-1] = 0 if rows > 1 else below - 1
            return drawn.to(launchers.device)

        self.table, self.position_table, self.type_row = (
            values(VOCAB, columns),
            values(NUM_POSITIONS, columns),
            values(columns),
        )
        self.ids, self.positions = ids(VOCAB), ids(NUM_POSITIONS)


@pytest.mark.parametrize("scale", [1.0, 37.94733])
@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("has_type", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_agrees_with_float64(
    launchers: Launchers, scale: float, has_positions: bool, has_type: bool, dtype: Dtype
) -> None:
    for (rows, columns), gap in zip(SHAPES, (0, 8, 3, 0, 0, 1), strict=True):
        drawn = Drawn(rows, columns, launchers)
        out, memory = guarded(rows, columns, dtype, launchers.device, gap=gap)
        launchers.embed(
            drawn.ids,
            drawn.table,
            out,
            scale=scale,
            positions=drawn.positions if has_positions else None,
            position_table=drawn.position_table if has_positions else None,
            type_row=drawn.type_row if has_type else None,
        )
        parts = [drawn.table[drawn.ids.long()].double() * scale]
        parts += [drawn.position_table[drawn.positions.long()].double()] if has_positions else []
        parts += [drawn.type_row.double().expand(rows, columns)] if has_type else []
        want, lost = torch.stack(parts).sum(0), 2e-7 * torch.stack(parts).abs().sum(0)
        assert (
            (out.double() - want).abs() <= SLACK * (BF16 if dtype == torch.bfloat16 else 0) * want.abs() + lost
        ).all(), (rows, columns)
        if scale == 1.0 and len(parts) == 1:
            assert torch.equal(out, drawn.table[drawn.ids.long()].to(dtype))
        assert is_untouched_around(out, memory)


def test_no_rows_are_no_work(launchers: Launchers) -> None:
    drawn = Drawn(1, 8, launchers)
    launchers.embed(drawn.ids[:0], drawn.table, torch.empty((0, 8), dtype=torch.bfloat16, device=launchers.device))


@pytest.mark.parametrize("wrong", ["ids", "table", "out", "positions", "position_table", "type_row"])
def test_a_tensor_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    drawn = Drawn(3, 64, launchers)
    tensors = {
        "ids": drawn.ids,
        "table": drawn.table,
        "out": torch.empty((3, 64), dtype=torch.bfloat16, device=launchers.device),
        "positions": drawn.positions,
        "position_table": drawn.position_table,
        "type_row": drawn.type_row,
    }
    tensors[wrong] = {
        "ids": drawn.ids.long(),
        "table": drawn.table.float(),
        "out": tensors["out"][:2],
        "positions": drawn.positions[:2],
        "position_table": drawn.position_table[:, :8],
        "type_row": drawn.type_row[:8],
    }[wrong]
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.embed(**tensors)

"""What the tests of linear layers share: rows with guards around them, and a bound for their sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from llmserve.checkpoints.dtypes import BLOCKS
from llmserve.ops.cuda.linear import Workspace, make_workspace
from llmserve.ops.cuda.packing import pack
from llmserve.ops.cuda.quantized_linear import QuantizedWeight, to_device
from tests.tiny.random_blocks import HALVES, random_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from llmserve.types import CheckpointTensor

GUARD: Final = 64
ROUNDING: Final = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}


def rows_of(random: np.random.Generator, rows: int, columns: int, on: torch.device, gap: int = 8) -> Tensor:
    """bfloat16 rows of very different sizes, NaN between them."""
    return _rows(random, rows, columns, on, gap, torch.bfloat16)


def stream_of(random: np.random.Generator, rows: int, columns: int, on: torch.device, gap: int = 5) -> Tensor:
    """The same in float32: a residual stream."""
    return _rows(random, rows, columns, on, gap, torch.float32)


def _rows(
    random: np.random.Generator, rows: int, columns: int, on: torch.device, gap: int, dtype: torch.dtype
) -> Tensor:
    memory = torch.full((rows, columns + gap), float("nan"), dtype=dtype, device=on)
    scale = 10.0 ** random.uniform(-2, 2, (rows, 1))
    memory[:, :columns] = torch.from_numpy(random.standard_normal((rows, columns)) * scale).to(dtype)
    return memory[:, :columns]


def guarded(rows: int, columns: int, dtype: torch.dtype, on: torch.device) -> tuple[Tensor, Tensor]:
    """Rows three values apart, and the whole memory around them, all NaN."""
    stride = columns + 3
    memory = torch.full((GUARD + rows * stride + GUARD,), float("nan"), dtype=dtype, device=on)
    return memory[GUARD : GUARD + rows * stride].view(rows, stride)[:, :columns], memory


def poisoned_workspace(on: torch.device, num_bytes: int = 1 << 20) -> Workspace:
    """Sums that are NaN until they are written."""
    workspace = make_workspace(num_bytes, on)
    workspace.sums.fill_(0xFF)
    return workspace


def tame_tensor(random: np.random.Generator, dtype: str, rows: int, columns: int) -> CheckpointTensor:
    """Random codes with scales like those of a model; `random_tensor` has the extreme ones."""
    tensor = random_tensor(random, dtype, rows, columns)
    if dtype == "i8":
        return tensor
    stored = np.frombuffer(tensor.data, np.uint8).reshape(rows, -1).copy()
    blocks = stored.reshape(-1, BLOCKS[dtype][1])
    for offset in HALVES[dtype]:
        halves = (random.standard_normal(len(blocks)) * 0.01).astype("<f2")
        blocks[:, offset : offset + 2] = halves[:, None].view(np.uint8)
    return type(tensor)(tensor.name, dtype, tensor.shape, memoryview(blocks.tobytes()))


def quantized(tensor: CheckpointTensor, on: torch.device) -> QuantizedWeight:
    packed = pack(tensor)
    assert packed is not None
    return to_device(packed, on)


def agrees(out: Tensor, want: Tensor, magnitude: Tensor, terms: int, what: str) -> None:
    """`want` in float64 within the rounding of the output and of float32 sums; `magnitude`: the sum of all sizes.

    A sum of n terms in any order errs by n * 2**-24 of that at most; random signs leave about its root.
    """
    assert not out.isnan().any(), what
    bound = ROUNDING[out.dtype] * want.abs() * 1.01 + 4 * terms**0.5 * 2.0**-24 * magnitude + 1e-30
    worst = ((out.double() - want).abs() / bound).max().item() if out.numel() else 0.0
    assert worst <= 1, f"{what}: {worst:.3g} of the bound"

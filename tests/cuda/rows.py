"""What tests of kernels that write rows share: poisoned memory around them, and int8 rows against float64."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, device, dtype

GUARD: Final = 64
BF16: Final = 2.0**-8
"""Half a unit in the last place of bfloat16, relative."""
SLACK: Final = 1.002
"""For float32 arithmetic in front of the rounding."""


def poison(kind: dtype) -> float:
    """What nothing writes by chance."""
    return float("nan") if kind.is_floating_point else 77


def guarded(rows: int, columns: int, kind: dtype, on: device, *, gap: int = 0) -> tuple[Tensor, Tensor]:
    """Poisoned rows `gap` values apart, and the whole memory they are a part of."""
    stride = columns + gap
    memory = torch.full((GUARD + rows * stride + GUARD,), poison(kind), dtype=kind, device=on)
    return memory[GUARD : GUARD + rows * stride].view(rows, stride)[:, :columns], memory


def is_untouched_around(view: Tensor, memory: Tensor) -> bool:
    """Whether everything outside the view is still poison."""
    copy = memory.clone()
    copy.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(poison(view.dtype))
    return bool(copy.isnan().all()) if view.dtype.is_floating_point else bool((copy == poison(view.dtype)).all())


def int8_agrees(out: Tensor, scales: Tensor, want: Tensor, *, error: Tensor | float = 0.0) -> bool:
    """Whether rows say `want` [rows, columns], float64: the scale within float32's rounding, the values within half a
    step. `error` is what float32 arithmetic may add to a value."""
    largest = want.abs().amax(-1)
    more = torch.as_tensor(error, dtype=torch.float64, device=want.device).expand_as(want).amax(-1)
    scales_agree = (scales.double() * 127 - largest).abs() <= 4e-6 * largest + more + 1e-30
    step = scales.double()[:, None]
    near = (out.double() * step - want).abs() <= 0.5 * step + 4e-6 * largest[:, None] + error + 1e-30
    uses_all = (out.abs().amax(-1) == 127) | (scales == 0)
    return bool(scales_agree.all() and near.all() and uses_all.all())

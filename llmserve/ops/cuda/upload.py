"""Arrays of a step to the GPU in one copy that nothing waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT: Final = 16
_DTYPES: Final = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.uint64): torch.int64,  # the same bits
    np.dtype(np.uint32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


class _Staging:
    """Host memory that one copy reads."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.bytes = self.tensor.numpy()
        self.sent = torch.cuda.Event() if pinned else None

    def wait(self) -> None:
        """Until the last copy has read it."""
        if self.sent is not None:
            self.sent.synchronize()


class Upload:
    """A region of device memory that arrays are sent into, from its start at every call.

    Arrays of the same shapes lie at the same addresses at every call: what CUDA graphs read.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        # Two: the host fills one while a copy may still read the other.
        self._staging = [_Staging(num_bytes, pinned=device.type == "cuda") for _ in range(2)]

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Tensors that hold the arrays once the current stream gets there; valid until the next call."""
        staging = self._staging[0]
        self._staging.reverse()
        staging.wait()
        views, offset = [], 0
        for array in arrays:
            end = offset + array.nbytes
            if end > len(staging.bytes):
                raise ValueError(f"a step's arrays exceed the {len(staging.bytes)} bytes that were planned for them")
            staging.bytes[offset:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            views.append(self._device[offset:end].view(_DTYPES[array.dtype]).view(array.shape))
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        offset = min(offset, len(staging.bytes))
        self._device[:offset].copy_(staging.tensor[:offset], non_blocking=True)
        if staging.sent is not None:
            staging.sent.record()
        return views


def send_once(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors of their own, in one copy that nothing waits for: torch keeps the pinned memory until it is done."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    parts = host.numpy()
    first = np.cumsum([0, *sizes])
    for array, start in zip(arrays, first, strict=False):
        parts[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, first.tolist(), strict=False)
    ]


def upload_bytes(arrays: Sequence[tuple[int, int]]) -> int:
    """Room for arrays of (values, bytes of one)."""
    return sum(-(-count * size // _ALIGNMENT) * _ALIGNMENT for count, size in arrays)

"""Checkpoint tensors on the GPU, brought over in pieces so that host memory stays bounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.dtypes import num_bytes
from llmserve.ops import Progress
from llmserve.types import CheckpointTensor

DTYPE: Final = torch.bfloat16
PIECE_BYTES: Final = 64 << 20
"""Of float32 values on the host at a time."""
_STORED: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_PHASE: Final = "loading weights to the GPU"


def row_pieces(tensor: CheckpointTensor, max_values: int) -> Iterator[tuple[int, CheckpointTensor]]:
    """The tensor cut along its first axis into pieces of about `max_values`: (first row, piece)."""
    rows = tensor.shape[0]
    step = max(1, max_values // max(1, math.prod(tensor.shape[1:])))
    whole = tensor.data
    row_bytes = len(whole) // max(1, rows)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        data = whole[first * row_bytes : last * row_bytes]
        yield first, replace(tensor, shape=(last - first, *tensor.shape[1:]), data=data)


@dataclass(slots=True)
class DeviceWeights:
    """What has been brought over. A tensor that is asked for again is the same memory."""

    device: torch.device
    progress: Progress
    total_bytes: int = 0
    """Of the checkpoint's tensors, for the progress."""
    num_bytes: int = 0
    """On the device."""
    _read_bytes: int = 0
    _known: dict[tuple[CheckpointTensor, torch.dtype], Tensor] = field(default_factory=dict)

    def matrix(self, tensor: CheckpointTensor) -> Tensor:
        """In bfloat16."""
        return self._bring(tensor, DTYPE)

    def vector(self, tensor: CheckpointTensor) -> Tensor:
        """In float32."""
        return self._bring(tensor, torch.float32)

    def rows(self, tensors: Sequence[CheckpointTensor]) -> Tensor:
        """The rows of matrices one below the other, in bfloat16."""
        if len(tensors) == 1:
            return self.matrix(tensors[0])
        out = self.empty((sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]), DTYPE)
        first = 0
        for tensor in tensors:
            self._fill(out[first : first + tensor.shape[0]], tensor)
            first += tensor.shape[0]
        return out

    def keep(self, array: NDArray[Any]) -> Tensor:
        """An array made on the host, copied over as it is."""
        tensor = torch.from_numpy(array).to(self.device)
        self.num_bytes += tensor.nbytes
        return tensor

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for weights."""
        out = torch.empty(shape, dtype=dtype, device=self.device)
        self.num_bytes += out.nbytes
        return out

    def was_read(self, tensor: CheckpointTensor) -> None:
        """Tell the progress."""
        self._read_bytes += num_bytes(tensor.dtype, tensor.shape)
        self.progress(_PHASE, min(self._read_bytes, self.total_bytes), self.total_bytes)

    def finish(self) -> None:
        """Everything is there."""
        self.progress(_PHASE, self.total_bytes, self.total_bytes)

    def _bring(self, tensor: CheckpointTensor, dtype: torch.dtype) -> Tensor:
        key = tensor, dtype
        if key not in self._known:
            self._known[key] = self.empty(tensor.shape, dtype)
            self._fill(self._known[key], tensor)
        return self._known[key]

    def _fill(self, out: Tensor, tensor: CheckpointTensor) -> None:
        for first, piece in row_pieces(tensor, PIECE_BYTES // 4):
            values = torch.from_numpy(np.ascontiguousarray(dequantize(piece))) if piece.order else _host_values(piece)
            out[first : first + len(values)].copy_(values.to(self.device))
        self.was_read(tensor)


def _host_values(piece: CheckpointTensor) -> Tensor:
    """In the type it is stored in, where torch knows that: the device converts faster than the host."""
    stored = _STORED.get(piece.dtype)
    if stored is None:
        return torch.from_numpy(np.ascontiguousarray(dequantize(piece)))
    raw = np.frombuffer(piece.data, np.int32 if piece.dtype == "f32" else np.int16)
    return torch.from_numpy(raw.copy()).view(stored).view(piece.shape)  # a copy: the mapping is read-only

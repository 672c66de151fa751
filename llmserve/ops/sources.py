"""What a packed matrix is made from: views of mapped files, and room for tensors that are converted when they are read.

The extension keeps the addresses it is given. A converted tensor gets memory of its own that holds its bytes only while
its matrix is packed: so one matrix at a time is there twice, not all of them for as long as the program lives.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llmserve import _C
from llmserve.checkpoints.dtypes import num_bytes
from llmserve.checkpoints.module import ConvertedTensor
from llmserve.types import CheckpointTensor


@dataclass(slots=True)
class MatrixSources:
    """The tensors of one matrix, as the extension sees them."""

    views: list[_C.TensorView]
    _converted: list[tuple[ConvertedTensor, mmap.mmap]]

    @classmethod
    def of(cls, tensors: Sequence[CheckpointTensor]) -> MatrixSources:
        sources = cls([], [])
        for tensor in tensors:
            data = tensor.data if not isinstance(tensor, ConvertedTensor) else sources._reserve(tensor)
            sources.views.append(tensor_view(tensor, data))
        return sources

    @contextmanager
    def filled(self) -> Iterator[None]:
        """The views hold the tensors' bytes. Raises `CheckpointError` where a tensor cannot be converted."""
        try:
            for tensor, room in self._converted:
                room[:] = tensor.data
            yield
        finally:
            for _, room in self._converted:
                room.madvise(mmap.MADV_DONTNEED)

    def _reserve(self, tensor: ConvertedTensor) -> memoryview:
        room = mmap.mmap(-1, num_bytes(tensor.dtype, tensor.shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._converted.append((tensor, room))
        return memoryview(room)


def tensor_view(tensor: CheckpointTensor, data: memoryview | None = None) -> _C.TensorView:
    """The tensor as the extension sees it, with its own bytes unless others are given; vectors are one row."""
    rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    return _C.TensorView(tensor.data if data is None else data, tensor.dtype, rows, columns, tensor.name)

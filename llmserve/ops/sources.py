"""What a packed matrix is made from: views of mapped files, and room for tensors that are converted when they are read.

The extension keeps the addresses it is given. A converted tensor gets memory of its own that holds its bytes only while
its matrix is packed: so one matrix at a time is there twice, not all of them for as long as the program lives.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmserve import _C
from llmserve.checkpoints.dtypes import num_bytes
from llmserve.checkpoints.module import ConvertedTensor
from llmserve.ops.nodes import Matrix
from llmserve.types import CheckpointTensor


@dataclass(slots=True)
class MatrixSources:
    """The tensors of one matrix, as the extension sees them."""

    views: list[_C.TensorView]
    _matrix: Matrix
    _rooms: dict[int, mmap.mmap]
    """Of converted tensors, by their place in the matrix."""

    @classmethod
    def of(cls, matrix: Matrix) -> MatrixSources:
        sources = cls([], matrix, {})
        for index, tensor in enumerate(matrix.tensors):
            data = tensor.data if not isinstance(tensor, ConvertedTensor) else sources._reserve(index, tensor)
            sources.views.append(tensor_view(tensor, data))
        return sources

    @contextmanager
    def filled(self, *, sample: bool) -> Iterator[None]:
        """The views hold the tensors' bytes, or those of the first and the last tile, which are the sample.

        Raises `CheckpointError` where a tensor cannot be converted.
        """
        tiles = self._matrix.sources
        try:
            if sample:
                for index, first, count in (tiles[0], tiles[-1]):
                    self._fill(index, first, first + count)
            else:
                for index in self._rooms:
                    self._fill(index, 0, self._matrix.tensors[index].shape[0])
            yield
        finally:
            for room in self._rooms.values():
                room.madvise(mmap.MADV_DONTNEED)

    def _fill(self, index: int, first: int, last: int) -> None:
        tensor = self._matrix.tensors[index]
        if isinstance(tensor, ConvertedTensor):
            data, start = tensor.rows(first, last), num_bytes(tensor.dtype, (first, tensor.shape[1]))
            self._rooms[index][start : start + len(data)] = data

    def _reserve(self, index: int, tensor: ConvertedTensor) -> memoryview:
        size = num_bytes(tensor.dtype, tensor.shape)
        self._rooms[index] = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(self._rooms[index])


def tensor_view(tensor: CheckpointTensor, data: memoryview | None = None) -> _C.TensorView:
    """The tensor as the extension sees it, with its own bytes unless others are given; vectors are one row."""
    rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    return _C.TensorView(tensor.data if data is None else data, tensor.dtype, rows, columns, tensor.name)

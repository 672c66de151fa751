"""Host memory for cached KV blocks, and the transfers between it and the device.

The host keeps a block of all caches in one row, so that a block crosses the bus in one piece. On the device its pieces
lie in many caches; they are gathered into a row of a small staging buffer first, and scattered from it on the way back:

    caches    k of layer 0   v of layer 0   k of layer 1   …       (device, a row per device block each)
                    ↓ gather       ↓              ↓    ↑ scatter
    staging   [ k of layer 0 | v of layer 0 | k of layer 1 | … ]   (device, a row per block under way)
                                   ↓ ↑ one copy each
    host      [ k of layer 0 | v of layer 0 | k of layer 1 | … ]   (pinned, a row per host block)

Everything is enqueued on the current stream, which must be the one of the steps: its order is all the synchronization
there is, also for the staging buffer. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Final, Literal

import torch
from torch import Tensor

from llmserve.errors import InvalidRequest, OutOfMemory

Transfer = tuple[Literal["to_host", "to_device"], int, int]
"""Kind, source and target, as of `BlockPool.take_transfers`."""

SEGMENT_BYTES: Final = 1 << 30
"""Most pinned memory asked for at once: PyTorch rounds each request up to a power of two."""
STAGING_BYTES: Final = 32 << 20
"""Most of the staging buffer: some hundred microseconds on the bus, so that launching the kernels for it costs less."""
_WORDS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8)


def bytes_per_block(tensors: Sequence[Tensor]) -> int:
    """Bytes of one block over all caches, each of which has a row per block."""
    return sum(tensor[:1].nbytes for tensor in tensors)


def host_blocks_in(num_bytes: int, block_bytes: int) -> int:
    """Host blocks that `num_bytes` hold; 0 bytes hold none. Raises `InvalidRequest` where less than one fits."""
    if 0 < num_bytes < block_bytes:
        raise InvalidRequest(
            f"host_kv_cache_bytes: {num_bytes}; a block takes {block_bytes} bytes", param="host_kv_cache_bytes"
        )
    return num_bytes // block_bytes


class HostBlocks:
    """Pinned memory for `num_blocks` blocks of the caches `tensors`.

    Each cache is dense and has a row per device block. Raises `ValueError` for others and `OutOfMemory`.
    """

    def __init__(self, tensors: Sequence[Tensor], num_blocks: int) -> None:
        check_caches(tensors)
        self.num_blocks = num_blocks
        device = tensors[0].device
        widths = [tensor[:1].nbytes for tensor in tensors]
        word = next(word for word in _WORDS if all(width % word.itemsize == 0 for width in widths))
        self._caches = [tensor.view(tensor.shape[0], -1).view(word) for tensor in tensors]
        ends = list(accumulate(cache.shape[1] for cache in self._caches))
        self._columns = [slice(end - cache.shape[1], end) for cache, end in zip(self._caches, ends, strict=True)]
        row_bytes = bytes_per_block(tensors)
        self._rows_per_segment = max(1, SEGMENT_BYTES // row_bytes)
        num_staged = min(num_blocks, tensors[0].shape[0], max(1, STAGING_BYTES // row_bytes))
        try:
            self._staging = torch.empty((num_staged, ends[-1]), dtype=word, device=device)
            self._segments = [
                torch.empty(
                    (min(self._rows_per_segment, num_blocks - first), ends[-1]),
                    dtype=word,
                    pin_memory=device.type == "cuda",
                )
                for first in range(0, num_blocks, self._rows_per_segment)
            ]
        except RuntimeError as error:
            size = f"{num_blocks} blocks ({num_blocks * row_bytes} bytes)"
            raise OutOfMemory(f"pinned host memory for {size} of the KV cache is not to be had") from error

    def apply(self, transfers: Iterable[Transfer]) -> None:
        """Enqueue the transfers. They have the effect of being done one after another."""
        for kind, run in groupby(transfers, key=lambda transfer: transfer[0]):
            # Within a run no source is a target, so of several writes of a target only the last one counts.
            source_of = {target: source for _, source, target in run}
            move = self._to_host if kind == "to_host" else self._to_device
            for pairs in self._batches(source_of):
                move(pairs)

    def _batches(self, source_of: dict[int, int]) -> Iterator[list[tuple[int, int]]]:
        """(source, target) pairs, as many at a time as can be staged."""
        pairs = [(source, target) for target, source in source_of.items()]
        size = len(self._staging)
        for first in range(0, len(pairs), size):
            yield pairs[first : first + size]

    def _to_host(self, pairs: list[tuple[int, int]]) -> None:
        blocks = self._indices([source for source, _ in pairs])
        for cache, columns in zip(self._caches, self._columns, strict=True):
            torch.index_select(cache, 0, blocks, out=self._staging[: len(pairs), columns])
        for staged, (_, slot) in zip(self._staging, pairs, strict=False):
            self._row(slot).copy_(staged, non_blocking=True)

    def _to_device(self, pairs: list[tuple[int, int]]) -> None:
        for staged, (slot, _) in zip(self._staging, pairs, strict=False):
            staged.copy_(self._row(slot), non_blocking=True)
        blocks = self._indices([target for _, target in pairs])
        for cache, columns in zip(self._caches, self._columns, strict=True):
            cache.index_copy_(0, blocks, self._staging[: len(pairs), columns])

    def _row(self, slot: int) -> Tensor:
        return self._segments[slot // self._rows_per_segment][slot % self._rows_per_segment]

    def _indices(self, blocks: list[int]) -> Tensor:
        """On the device. From pageable memory the copy would wait for all that is enqueued."""
        indices = torch.tensor(blocks, dtype=torch.int64)
        if self._staging.device.type != "cuda":
            return indices
        return indices.pin_memory().to(self._staging.device, non_blocking=True)


def check_caches(tensors: Sequence[Tensor]) -> None:
    """Raises `ValueError` for what has no row per block."""
    if not tensors:
        raise ValueError("tensors: there is no cache")
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        if not tensor.is_contiguous() or tensor.ndim < 2 or tensor.numel() == 0:
            raise ValueError(f"tensors: number {index} is not dense, with a row per block")
        if tensor.shape[0] != first.shape[0] or tensor.device != first.device:
            raise ValueError(f"tensors: number {index} has other blocks or another device than the first")

"""Who holds which KV blocks: the engine's side of the block pool.

Owns the handles of all block tables. Invariants: a sequence has a table from its first plan to its release; a table
covers whole blocks; what `release` returns to the pool is never read again by that sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from llmserve.engine.sequence import NO_TABLE, Sequence
from llmserve.ops.protocol import Executor


class BlockPool(Protocol):
    """Tables of fixed-size blocks, by handle. The extension has the real one."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_free(self) -> int: ...

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    def create(self) -> int:
        """Handle of a new, empty table."""

    def reserve(self, handles: list[int], num_tokens: list[int]) -> int:
        """Grow each table, in order, to hold num_tokens; stop at the first that does not fit. How many succeeded."""

    def release(self, handle: int) -> None:
        """Give back a table and its blocks."""

    def truncate(self, handle: int, num_tokens: int) -> None:
        """Give back the blocks past num_tokens."""

    def table(self, handle: int) -> list[int]:
        """Block ids in order."""

    def check_integrity(self) -> None:
        """Raises RuntimeError when a block is lost or held twice."""


class PagedExecutor(Executor, Protocol):
    """An executor whose KV cache has been allocated."""

    @property
    def block_pool(self) -> BlockPool: ...


class KVCacheManager:
    """Reserves and releases blocks for sequences."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_size = pool.block_size
        self.capacity_tokens = pool.num_free * pool.block_size
        """Tokens of the longest sequence that could ever fit."""

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_used(self) -> int:
        return self._pool.num_blocks - self._pool.num_free

    def reserve(self, sequences: Seq[Sequence]) -> int:
        """Make room for all known tokens of each sequence, in one ordered transaction. How many now have it."""
        for seq in sequences:
            if seq.block_table == NO_TABLE:
                seq.block_table = self._pool.create()
        handles = [seq.block_table for seq in sequences]
        num_fitting = self._pool.reserve(handles, [seq.num_tokens for seq in sequences])
        for seq in sequences[:num_fitting]:
            seq.num_reserved_tokens = -(-seq.num_tokens // self._block_size) * self._block_size
        return num_fitting

    def release(self, seq: Sequence) -> None:
        """Give back all blocks of a sequence; its computed tokens are forgotten."""
        if seq.block_table != NO_TABLE:
            self._pool.release(seq.block_table)
        seq.block_table = NO_TABLE
        seq.num_reserved_tokens = 0
        seq.num_computed_tokens = 0

    def check_integrity(self) -> None:
        """Raises RuntimeError when the pool contradicts itself."""
        self._pool.check_integrity()

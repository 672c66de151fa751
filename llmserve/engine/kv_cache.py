"""Who holds which KV blocks: the engine's side of the block pool.

Owns the handles of all block tables. Invariants: a sequence has a table from its admission to its release; a table
covers whole blocks; what `release` returns to the pool is never read again by that sequence; only full blocks of
computed tokens are offered to others.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.sequence import NO_TABLE, Sequence
from llmserve.ops.protocol import Executor


class BlockPool(Protocol):
    """Tables of fixed-size blocks, by handle. The extension has the real one."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_free(self) -> int: ...

    @property
    def num_host_hits(self) -> int:
        """Blocks brought back from the host so far."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    def create(self) -> int:
        """Handle of a new, empty table."""

    def admit(
        self,
        handles: list[int],
        token_ids: list[NDArray[np.int32]],
        salts: list[int],
        num_tokens: list[int],
        reads_cache: list[bool],
    ) -> list[int]:
        """Fill empty tables, in order, with the longest cached prefix and new blocks up to num_tokens.

        Stops at the first that does not fit. The cached tokens of each admitted one.
        """

    def match(self, token_ids: NDArray[np.int32], salt: int) -> int:
        """Tokens that `admit` would find cached; touches nothing."""

    def commit(self, handle: int, token_ids: NDArray[np.int32], num_computed: int) -> None:
        """Let others match the full blocks among the first num_computed tokens."""

    def fork(self, handle: int, num_tokens: int) -> int:
        """A new table that shares the first num_tokens; MemoryError when a partial block cannot be copied."""

    def reserve(self, handles: list[int], num_tokens: list[int]) -> int:
        """Grow each table, in order, to hold num_tokens; stop at the first that does not fit. How many succeeded."""

    def release(self, handle: int) -> None:
        """Give back a table and its blocks."""

    def discard(self, handle: int) -> None:
        """Give back a table and its blocks, and let nobody match them any more."""

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
    """Reserves, shares and releases blocks for sequences. Without `shares_prefixes` nothing is found or offered."""

    def __init__(self, pool: BlockPool, *, shares_prefixes: bool = True) -> None:
        self._pool = pool
        self._block_size = pool.block_size
        self._shares_prefixes = shares_prefixes
        self.capacity_tokens = pool.num_free * pool.block_size
        """Tokens of the longest sequence that could ever fit."""

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_used(self) -> int:
        return self._pool.num_blocks - self._pool.num_free

    @property
    def num_host_hits(self) -> int:
        """Tokens brought back from the host so far, those of a sequence admitted again included."""
        return self._pool.num_host_hits * self._block_size

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._block_size)

    def grow(self, sequences: Seq[Sequence]) -> int:
        """Make room for all known tokens of each sequence, in one ordered transaction. How many now have it."""
        handles = [seq.block_table for seq in sequences]
        num_fitting = self._pool.reserve(handles, [seq.num_tokens for seq in sequences])
        for seq in sequences[:num_fitting]:
            self._note_reserved(seq)
        return num_fitting

    def admit(self, seq: Sequence) -> bool:
        """Give a sequence its table, what is cached of it included; `num_computed_tokens` says how much that is.

        False, and nothing has changed, when it does not fit.
        """
        handle = self._pool.create()
        reads_cache = self._shares_prefixes and seq.reads_cache
        found = self._pool.admit([handle], [seq.view], [seq.cache_salt], [seq.num_tokens], [reads_cache])
        if not found:
            self._pool.release(handle)
            return False
        seq.block_table, seq.num_computed_tokens = handle, found[0]
        self._note_reserved(seq)
        return True

    def fork(self, seq: Sequence, parent: Sequence) -> bool:
        """Give a sequence all but the last token of its parent's prompt, whose blocks it shares.

        False, and nothing has changed, when the blocks of its own do not fit.
        """
        num_shared = seq.num_prompt_tokens - 1
        try:
            handle = self._pool.fork(parent.block_table, num_shared)
        except MemoryError:
            return False
        if not self._pool.reserve([handle], [seq.num_tokens]):
            self._pool.release(handle)
            return False
        seq.block_table, seq.num_computed_tokens = handle, num_shared
        self._note_reserved(seq)
        return True

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of a waiting sequence that are cached now."""
        return self._pool.match(seq.view, seq.cache_salt) if seq.reads_cache else 0

    def reserve_drafts(self, seq: Sequence, num_drafts: int, *, num_kept_free: int) -> int:
        """Make room for drafts after the known tokens, if so many blocks stay free then; how many drafts fit.

        What is reserved stays with the sequence: it grows into it.
        """
        wanted = seq.num_tokens + num_drafts
        if wanted > seq.num_reserved_tokens:
            num_more = self.num_blocks_of(wanted) - self.num_blocks_of(seq.num_reserved_tokens)
            if self.num_free - num_more >= num_kept_free and self._pool.reserve([seq.block_table], [wanted]):
                self.commit(seq)
                seq.num_reserved_tokens += num_more * self._block_size
        return min(num_drafts, seq.num_reserved_tokens - seq.num_tokens)

    def commit(self, seq: Sequence) -> None:
        """Offer the computed full blocks of a sequence to others."""
        if self._shares_prefixes and not seq.is_poisoned:
            self._pool.commit(seq.block_table, seq.view, seq.num_computed_tokens)

    def release(self, seq: Sequence) -> None:
        """Give back all blocks of a sequence; its computed tokens are forgotten, poisoned ones for everybody."""
        if seq.block_table != NO_TABLE and seq.is_poisoned:
            self._pool.discard(seq.block_table)
        elif seq.block_table != NO_TABLE:
            self.commit(seq)
            self._pool.release(seq.block_table)
        seq.block_table = NO_TABLE
        seq.num_reserved_tokens = 0
        seq.num_computed_tokens = 0

    def check_integrity(self) -> None:
        """Raises RuntimeError when the pool contradicts itself."""
        self._pool.check_integrity()

    def _note_reserved(self, seq: Sequence) -> None:
        seq.num_reserved_tokens = self.num_blocks_of(seq.num_tokens) * self._block_size

"""The block pool in plain Python: the oracle of the compiled one, with the same verbs, block ids and order of reuse.

Where the compiled pool keeps a keyed hash of a prefix, the twin keeps the prefix itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Prefix = tuple[int, tuple[int, ...]]
"""Salt, and all tokens up to the end of a block."""

Transfer = tuple[Literal["to_host", "to_device"], int, int]
"""Kind, source and target: a block of the device and a slot of the host, or the other way round."""


@dataclass(slots=True)
class Table:
    """One sequence's blocks."""

    blocks: list[int] = field(default_factory=list)
    prefixes: list[Prefix] = field(default_factory=list)
    """Of the committed blocks, which are the first ones."""
    salt: int = 0
    may_commit: bool = True
    """False once the cache was reset under the sequence: its blocks hold what the new cache must not."""


class HostTwin:
    """Which prefixes lie in which host slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: OrderedDict[Prefix, int] = OrderedDict()
        """The coldest first."""
        self.pinned: set[Prefix] = set()
        """To be read next, so not to be overwritten."""
        self._unused = list(range(num_slots - 1, -1, -1))

    def insert(self, prefix: Prefix) -> int | None:
        """A slot for a prefix that is in none; None when there is none to be had."""
        if self._unused:
            slot = self._unused.pop()
        else:
            coldest = next((known for known in self.slots if known not in self.pinned), None)
            if coldest is None:
                return None
            slot = self.slots.pop(coldest)
        self.slots[prefix] = slot
        return slot

    def unpin_as_coldest(self, prefix: Prefix) -> None:
        self.pinned.remove(prefix)
        self.slots.move_to_end(prefix, last=False)

    def forget(self, prefix: Prefix) -> None:
        if prefix in self.slots:
            self._unused.append(self.slots.pop(prefix))

    def clear(self) -> None:
        self.slots.clear()
        self._unused = list(range(self.num_slots - 1, -1, -1))

    def check_integrity(self) -> None:
        if self.pinned or sorted([*self.slots.values(), *self._unused]) != list(range(self.num_slots)):
            raise RuntimeError("a host slot is lost, used twice or pinned for ever")


class BlockPoolTwin:
    """Tables of blocks by handle. Freed blocks that others can match are kept until there is no other free block."""

    def __init__(self, num_blocks: int, block_size: int, hash_key: int = 0, num_host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: dict[int, None] = {}
        """Free blocks that others can match, the one touched longest ago first."""
        self._index: dict[Prefix, int] = {}
        self._prefix_of: dict[int, Prefix] = {}
        self.host = HostTwin(num_host_blocks)
        self.transfers: list[Transfer] = []
        """Not taken yet."""
        self.num_host_hits = 0
        self._new: set[int] = set()
        self._copies: dict[int, int] = {}
        """Source by destination. A queued copy holds a reference to its source."""
        self._tables: dict[int, Table] = {}
        self._next_handle = 1

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        return len(self._index)

    @property
    def num_host_cached(self) -> int:
        return len(self.host.slots)

    @property
    def num_tables(self) -> int:
        return len(self._tables)

    def create(self) -> int:
        return self._insert(Table())

    def reserve(self, handles: Sequence[int], num_tokens: Sequence[int]) -> int:
        tables = [self._find(handle) for handle in handles]
        needed = [self._num_blocks_of(tokens) for tokens in num_tokens]
        for count, (table, num_blocks) in enumerate(zip(tables, needed, strict=True)):
            num_missing = max(0, num_blocks - len(table.blocks))
            if num_missing > self.num_free:
                return count
            table.blocks += [self._allocate() for _ in range(num_missing)]
        return len(handles)

    def admit(
        self,
        handles: Sequence[int],
        token_ids: Sequence[Iterable[int]],
        salts: Sequence[int],
        num_tokens: Sequence[int],
        reads_cache: Sequence[bool],
    ) -> list[int]:
        if any(self._find(handle).blocks for handle in handles) or len({*handles}) < len(handles):
            raise ValueError("handles: only empty tables can be admitted")
        needed = [self._num_blocks_of(tokens) for tokens in num_tokens]
        num_cached = []
        for handle, ids, salt, num_blocks, reads in zip(handles, token_ids, salts, needed, reads_cache, strict=True):
            prefixes = self._match(list(ids), salt) if reads else []
            matched = [self._index[prefix] for prefix in prefixes if prefix in self._index]
            num_missing = max(num_blocks, len(prefixes)) - len(matched)
            if num_missing > self.num_free - sum(block in self._evictable for block in matched):
                break
            for block in matched:
                self._hold(block)
            self._bring_back([prefix for prefix in prefixes if prefix not in self._index])
            table = self._find(handle)
            table.salt, table.prefixes = salt, prefixes
            table.blocks = [self._index[prefix] for prefix in prefixes]
            table.blocks += [self._allocate() for _ in range(num_blocks - len(prefixes))]
            num_cached.append(len(prefixes) * self.block_size)
        return num_cached

    def match(self, token_ids: Iterable[int], salt: int) -> int:
        return len(self._match(list(token_ids), salt)) * self.block_size

    def commit(self, handle: int, token_ids: Iterable[int], num_computed: int) -> None:
        table, ids = self._find(handle), list(token_ids)
        num_full = num_computed // self.block_size
        if self._num_blocks_of(num_computed) > len(table.blocks) or num_computed > len(ids):
            raise ValueError("num_computed: more than the table or the tokens hold")
        if not table.may_commit:
            return
        for number in range(len(table.prefixes), num_full):
            prefix = (table.salt, tuple(ids[: (number + 1) * self.block_size]))
            table.prefixes.append(prefix)
            block = table.blocks[number]
            if prefix not in self._index and block not in self._prefix_of:
                self._make_known(block, prefix)

    def fork(self, handle: int, num_tokens: int) -> int:
        table = self._find(handle)
        num_full, num_rest = divmod(num_tokens, self.block_size)
        if num_tokens < 0 or self._num_blocks_of(num_tokens) > len(table.blocks):
            raise ValueError("num_tokens: more than the table holds")
        if num_rest and not self.num_free:
            raise MemoryError("no block is free for the copy of a partial block")
        child = replace(table, blocks=table.blocks[:num_full], prefixes=table.prefixes[:num_full])
        for block in child.blocks:
            self._hold(block)
        if num_rest:
            source = self._copies.get(table.blocks[num_full], table.blocks[num_full])
            self._hold(source)
            target = self._allocate()
            self._new.discard(target)
            self._copies[target] = source
            child.blocks.append(target)
        return self._insert(child)

    def truncate(self, handle: int, num_tokens: int) -> None:
        table = self._find(handle)
        num_kept = self._num_blocks_of(num_tokens)
        num_full, num_rest = divmod(num_tokens, self.block_size)
        if num_rest and num_full < len(table.blocks):
            self._open(table.blocks[num_full])
        del table.prefixes[num_full:]
        for block in reversed(table.blocks[num_kept:]):
            self._drop(block)
        del table.blocks[num_kept:]

    def release(self, handle: int) -> None:
        for block in reversed(self._find(handle).blocks):
            self._drop(block)
        del self._tables[handle]

    def discard(self, handle: int) -> None:
        for block in self._find(handle).blocks:
            if block in self._prefix_of:
                self.host.forget(self._prefix_of[block])
            self._forget(block)
        self.release(handle)

    def reset_cache(self) -> None:
        self._index.clear()
        self._prefix_of.clear()
        self.host.clear()
        self._free += self._evictable
        self._evictable.clear()
        for table in self._tables.values():
            table.prefixes.clear()
            table.may_commit = False

    def take_transfers(self) -> list[Transfer]:
        transfers, self.transfers = self.transfers, []
        return transfers

    def take_copies(self) -> list[tuple[int, int]]:
        copies = [(source, target) for target, source in self._copies.items()]
        self._copies.clear()
        for source, _ in copies:
            self._drop(source)
        return copies

    def take_new_blocks(self) -> list[int]:
        blocks = sorted(self._new)
        self._new.clear()
        return blocks

    def table(self, handle: int) -> list[int]:
        return list(self._find(handle).blocks)

    def check_integrity(self) -> None:
        held = [block for table in self._tables.values() for block in table.blocks] + list(self._copies.values())
        if [held.count(block) for block in range(self.num_blocks)] != self._references:
            raise RuntimeError("reference counts disagree with the tables")
        if sorted({*held} | {*self._free} | {*self._evictable}) != list(range(self.num_blocks)):
            raise RuntimeError("a block is lost")
        if len({*held}) + len(self._free) + len(self._evictable) != self.num_blocks:
            raise RuntimeError("a block is held and free, or free twice")
        if self._prefix_of != {block: prefix for prefix, block in self._index.items()}:
            raise RuntimeError("the index names a block twice")
        if not self._evictable.keys() <= self._prefix_of.keys() or self._prefix_of.keys() & {*self._free}:
            raise RuntimeError("the index and the free blocks disagree")
        self.host.check_integrity()

    def _find(self, handle: int) -> Table:
        if handle not in self._tables:
            raise ValueError(f"handle: unknown sequence {handle}")
        return self._tables[handle]

    def _insert(self, table: Table) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._tables[handle] = table
        return handle

    def _num_blocks_of(self, num_tokens: int) -> int:
        if num_tokens < 0:
            raise ValueError("num_tokens: must not be negative")
        return -(-num_tokens // self.block_size)

    def _match(self, ids: list[int], salt: int) -> list[Prefix]:
        """Prefixes of the longest run of known blocks; one token is always left to compute."""
        prefixes: list[Prefix] = []
        for end in range(self.block_size, len(ids), self.block_size):
            prefix = (salt, tuple(ids[:end]))
            if prefix not in self._index and prefix not in self.host.slots:
                break
            prefixes.append(prefix)
        return prefixes

    def _bring_back(self, prefixes: list[Prefix]) -> None:
        """Give each a block, which the host will fill."""
        self.num_host_hits += len(prefixes)
        self.host.pinned.update(prefixes)
        for prefix in prefixes:
            block = self._allocate()
            self._new.remove(block)
            self.transfers.append(("to_device", self.host.slots[prefix], block))
            self._make_known(block, prefix)
            self.host.unpin_as_coldest(prefix)

    def _make_known(self, block: int, prefix: Prefix) -> None:
        self._index[prefix] = block
        self._prefix_of[block] = prefix

    def _offload(self, block: int) -> None:
        """Keep what a known block holds on the host, where there is room."""
        prefix = self._prefix_of[block]
        if prefix in self.host.slots:
            self.host.slots.move_to_end(prefix)
            return
        slot = self.host.insert(prefix)
        if slot is not None:
            self.transfers.append(("to_host", block, slot))

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._evictable))
            del self._evictable[block]
            self._offload(block)
            self._forget(block)
        self._references[block] = 1
        self._new.add(block)
        return block

    def _hold(self, block: int) -> None:
        self._evictable.pop(block, None)
        self._references[block] += 1

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] > 0:
            return
        self._new.discard(block)
        if block in self._prefix_of:
            self._evictable[block] = None
        else:
            self._free.append(block)
        if block in self._copies:
            self._drop(self._copies.pop(block))

    def _open(self, block: int) -> None:
        """The block will be written again: nobody else may hold or match it."""
        if self._references[block] - list(self._copies.values()).count(block) > 1:
            raise ValueError("num_tokens: cuts into a block that another sequence holds")
        self._forget(block)

    def _forget(self, block: int) -> None:
        if block in self._prefix_of:
            del self._index[self._prefix_of.pop(block)]

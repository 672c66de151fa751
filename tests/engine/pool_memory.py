"""What an executor's memory holds while a block pool is exercised: tokens in place of keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.engine.block_pool_twin import Prefix, Transfer

Content = tuple[int, ...]
"""The salt and the whole prefix that a key and its value depend on."""
POISON: Content = ()


@dataclass(slots=True)
class Reader:
    """A sequence as the engine sees it."""

    salt: int
    token_ids: list[int]
    num_computed: int = 0


@dataclass(slots=True)
class Memory:
    """What the executor has written on the device, slot by slot, and moved to the host, block by block."""

    block_size: int
    slots: dict[tuple[int, int], Content] = field(default_factory=dict)
    host: dict[int, list[Content | None]] = field(default_factory=dict)
    num_moved: Counter[str] = field(default_factory=Counter)
    """Blocks moved to the host and to the device."""

    def execute(
        self, transfers: Iterable[Transfer], new_blocks: Iterable[int], copies: Iterable[tuple[int, int]]
    ) -> None:
        """What a step does before it writes, in this order."""
        for kind, source, target in transfers:
            self.num_moved[kind] += 1
            if kind == "to_host":
                self.host[target] = self._block(source)
            else:
                self._set_block(target, self.host[source])
        for block in new_blocks:
            self.zero(block)
        for source, target in copies:
            self._set_block(target, self._block(source))

    def ahead(
        self, transfers: Iterable[Transfer], new_blocks: Iterable[int], copies: Iterable[tuple[int, int]]
    ) -> Memory:
        """The memory as it will be; this one stays as it is."""
        memory = Memory(self.block_size, dict(self.slots), dict(self.host))
        memory.execute(transfers, new_blocks, copies)
        return memory

    def zero(self, block: int) -> None:
        self._set_block(block, [None] * self.block_size)

    def poison(self, block: int) -> None:
        self._set_block(block, [POISON] * self.block_size)

    def write(self, table: list[int], reader: Reader, end: int) -> None:
        for position in range(reader.num_computed, end):
            block, offset = divmod(position, self.block_size)
            self.slots[table[block], offset] = (reader.salt, *reader.token_ids[: position + 1])

    def check(self, table: list[int], reader: Reader) -> None:
        for position in range(reader.num_computed):
            block, offset = divmod(position, self.block_size)
            assert self.slots[table[block], offset] == (reader.salt, *reader.token_ids[: position + 1])

    def check_known(self, index: dict[Prefix, int], host: dict[Prefix, int]) -> None:
        """Whatever an index leads to is there."""
        for prefix, block in index.items():
            assert self._block(block) == self._contents(prefix)
        for prefix, slot in host.items():
            assert self.host[slot] == self._contents(prefix)

    def _contents(self, prefix: Prefix) -> list[Content | None]:
        salt, ids = prefix
        return [(salt, *ids[: end + 1]) for end in range(len(ids) - self.block_size, len(ids))]

    def _block(self, block: int) -> list[Content | None]:
        return [self.slots.get((block, offset)) for offset in range(self.block_size)]

    def _set_block(self, block: int, contents: list[Content | None]) -> None:
        for offset, content in enumerate(contents):
            if content is None:
                self.slots.pop((block, offset), None)
            else:
                self.slots[block, offset] = content

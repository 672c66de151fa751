"""The block pool in plain Python: the oracle of the compiled one, with the same verbs."""

from __future__ import annotations


class BlockPoolTwin:
    """Tables of blocks by handle; freed blocks are handed out again before untouched ones."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}
        self._next_handle = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def create(self) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._tables[handle] = []
        return handle

    def reserve(self, handles: list[int], num_tokens: list[int]) -> int:
        for count, (handle, tokens) in enumerate(zip(handles, num_tokens, strict=True)):
            table = self._tables[handle]
            num_missing = max(0, -(-tokens // self.block_size) - len(table))
            if num_missing > len(self._free):
                return count
            table += [self._free.pop() for _ in range(num_missing)]
        return len(handles)

    def release(self, handle: int) -> None:
        self._free += reversed(self._tables.pop(handle))

    def truncate(self, handle: int, num_tokens: int) -> None:
        table = self._tables[handle]
        num_kept = -(-num_tokens // self.block_size)
        self._free += reversed(table[num_kept:])
        del table[num_kept:]

    def table(self, handle: int) -> list[int]:
        return list(self._tables[handle])

    def check_integrity(self) -> None:
        held = [block for table in self._tables.values() for block in table]
        if sorted(held + self._free) != list(range(self.num_blocks)):
            raise RuntimeError("a block is lost or held twice")

    @property
    def num_tables(self) -> int:
        return len(self._tables)

"""The compiled block pool against its Python twin, and what its blocks hold against what they should."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.block_pool_twin import BlockPoolTwin
from tests.engine.pool_memory import Memory, Reader

extension = pytest.importorskip("llmserve._C", reason="the extension is not built")

TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=24)
SALTS = st.integers(0, 1)
SIZES = st.integers(0, 30)
PICKS = st.integers(0, 1000)


class PoolMachine(RuleBasedStateMachine):
    """An engine without a model: sequences come, compute, fork, are cut, and leave."""

    @initialize(
        num_blocks=st.integers(1, 14),
        block_size=st.sampled_from([1, 2, 3, 4]),
        num_host_blocks=st.sampled_from([0, 1, 2, 3, 5, 8, 20]),
    )
    def begin(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.pool = extension.BlockPool(num_blocks, block_size, 2**127 + 5, num_host_blocks)
        self.twin = BlockPoolTwin(num_blocks, block_size, num_host_blocks=num_host_blocks)
        self.memory = Memory(block_size)
        self.readers: dict[int, Reader] = {}

    def both(self, call: Callable[[BlockPoolTwin], object]) -> object:
        """The same call on both pools must have the same outcome."""
        outcomes: list[object] = []
        for pool in (self.pool, self.twin):
            try:
                outcomes.append(call(pool))
            except (ValueError, MemoryError) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    def pick(self, number: int) -> int:
        return sorted(self.readers)[number % len(self.readers)]

    @rule(texts=st.lists(st.tuples(TEXTS, SALTS, st.booleans()), min_size=1, max_size=3), more=st.integers(0, 3))
    def admit(self, texts: list[tuple[list[int], int, bool]], more: int) -> None:
        self.admit_all(texts, more)

    @precondition(lambda self: self.twin.host.slots)
    @rule(numbers=st.lists(PICKS, min_size=1, max_size=3), text=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def admit_from_host(self, numbers: list[int], text: list[int]) -> None:
        """Sequences that begin like what is on the host; all but the first may find it gone."""
        known = sorted(self.twin.host.slots)
        chosen = [known[number % len(known)] for number in numbers]
        self.admit_all([([*ids, *text], salt, True) for salt, ids in chosen], 0)

    def admit_all(self, texts: list[tuple[list[int], int, bool]], more: int) -> None:
        handles = [self.both(lambda pool: pool.create()) for _ in texts]
        ids, salts, reads = zip(*texts, strict=True)
        sizes = [len(text) + more for text in ids]
        num_cached = self.both(lambda pool: pool.admit(handles, ids, salts, sizes, reads))  # type: ignore[arg-type]
        assert isinstance(num_cached, list)
        for index, handle in enumerate(handles):
            assert isinstance(handle, int)
            if index >= len(num_cached):
                self.both(lambda pool, handle=handle: pool.release(handle))  # type: ignore[misc]
                continue
            assert num_cached[index] < len(ids[index])
            assert reads[index] or num_cached[index] == 0
            self.readers[handle] = Reader(salts[index], [*ids[index], *[0] * more], num_cached[index])

    @rule(text=TEXTS, salt=SALTS)
    def match(self, text: list[int], salt: int) -> None:
        self.both(lambda pool: pool.match(text, salt))

    @precondition(lambda self: self.readers)
    @rule(picks=st.lists(st.tuples(PICKS, st.integers(1, 9)), min_size=1, max_size=3))
    def step(self, picks: list[tuple[int, int]]) -> None:
        """Reserve, compute and commit a few tokens of some sequences."""
        chosen = {self.pick(number): size for number, size in picks}
        ends = {handle: self.readers[handle].num_computed + size for handle, size in chosen.items()}
        fitting = self.both(lambda pool: pool.reserve(list(ends), list(ends.values())))
        assert isinstance(fitting, int)
        self.execute_pending()
        for handle in list(ends)[:fitting]:
            reader = self.readers[handle]
            reader.token_ids += [1] * (ends[handle] - len(reader.token_ids))
            self.memory.write(self.twin.table(handle), reader, ends[handle])
        for handle in list(ends)[:fitting]:
            reader = self.readers[handle]
            reader.num_computed = ends[handle]
            array = np.array(reader.token_ids, np.int32)
            self.pool.commit(handle, array if handle % 2 else reader.token_ids, reader.num_computed)
            self.twin.commit(handle, reader.token_ids, reader.num_computed)

    def execute_pending(self) -> None:
        transfers = self.both(lambda pool: pool.take_transfers())
        assert isinstance(transfers, list)
        new = self.twin.take_new_blocks()
        assert sorted(self.pool.take_new_blocks()) == new
        copies = self.both(lambda pool: pool.take_copies())
        assert isinstance(copies, list)
        assert not {source for source, _ in copies} & {target for _, target in copies}
        assert not {target for _, target in copies} & {*new}
        self.memory.execute(transfers, new, copies)

    @precondition(lambda self: self.readers)
    @rule(number=PICKS, share=st.integers(0, 30), text=TEXTS)
    def fork(self, number: int, share: int, text: list[int]) -> None:
        parent = self.pick(number)
        reader = self.readers[parent]
        num_tokens = reader.num_computed - share % (reader.num_computed + 1)
        child = self.both(lambda pool: pool.fork(parent, num_tokens))
        if isinstance(child, int):
            self.readers[child] = Reader(reader.salt, [*reader.token_ids[:num_tokens], *text], num_tokens)

    @precondition(lambda self: self.readers)
    @rule(number=PICKS, kept=SIZES, text=TEXTS)
    def truncate(self, number: int, kept: int, text: list[int]) -> None:
        """Refused or done, other sequences keep what they have; the cut one goes on with another text."""
        handle = self.pick(number)
        reader = self.readers[handle]
        if self.both(lambda pool: pool.truncate(handle, kept)) is None:
            reader.num_computed = min(kept, reader.num_computed)
            reader.token_ids = [*reader.token_ids[: reader.num_computed], *text]

    @precondition(lambda self: self.readers)
    @rule(number=PICKS)
    def release(self, number: int) -> None:
        handle = self.pick(number)
        self.both(lambda pool: pool.release(handle))
        del self.readers[handle]

    @precondition(lambda self: self.readers)
    @rule(number=PICKS, after_a_step=st.booleans())
    def discard(self, number: int, after_a_step: bool) -> None:
        """Its blocks hold nonsense: nobody may find them, on the device or on the host."""
        handle = self.pick(number)
        table = self.twin.table(handle)
        found = [self.twin._prefix_of[block] for block in table if block in self.twin._prefix_of]
        if after_a_step:
            self.execute_pending()
            for block in table:
                if self.twin._references[block] == 1:
                    self.memory.poison(block)
        self.both(lambda pool: pool.discard(handle))
        assert not self.twin._prefix_of.keys() & {*table}
        for salt, ids in found:
            assert self.pool.match([*ids, 0], salt) < len(ids)
        del self.readers[handle]

    @precondition(lambda self: self.readers)
    @rule(number=PICKS, size=st.integers(-1, 60))
    def commit_anything(self, number: int, size: int) -> None:
        """Too much is refused; what is not computed yet must not be committed, so stop there."""
        handle = self.pick(number)
        reader = self.readers[handle]
        if (
            not reader.num_computed
            < size
            <= min(len(reader.token_ids), len(self.twin.table(handle)) * self.twin.block_size)
        ):
            self.both(lambda pool: pool.commit(handle, reader.token_ids, size))

    @rule(size=st.integers(-1, 40), handle=st.integers(-1, 60))
    def call_with_nonsense(self, size: int, handle: int) -> None:
        if handle not in self.readers:
            self.both(lambda pool: pool.fork(handle, size))
            self.both(lambda pool: pool.reserve([*self.readers, handle], [size] * (len(self.readers) + 1)))
            self.both(lambda pool: pool.admit([handle], [[0]], [0], [size], [True]))
        elif size < 0:
            self.both(lambda pool: pool.truncate(handle, size))
            self.both(lambda pool: pool.fork(handle, size))
        elif self.twin.table(handle):
            self.both(lambda pool: pool.admit([handle], [[0]], [0], [size], [True]))

    @precondition(lambda self: self.readers and len(self.readers) > 2)
    @rule()
    def reset_cache(self) -> None:
        self.both(lambda pool: pool.reset_cache())
        assert self.pool.num_cached == self.pool.num_host_cached == 0

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        self.twin.check_integrity()
        for name in ("num_free", "num_cached", "num_host_cached", "num_host_hits"):
            assert getattr(self.pool, name) == getattr(self.twin, name), name
        for handle in self.readers:
            assert self.pool.table(handle) == self.twin.table(handle)

    @invariant()
    def blocks_hold_what_they_should(self) -> None:
        """Nothing that a sequence relies on, or could find, was overwritten. What is pending counts as done."""
        if not hasattr(self, "pool"):
            return
        copies = [(source, target) for target, source in self.twin._copies.items()]
        memory = self.memory.ahead(self.twin.transfers, self.twin._new, copies)
        for handle, reader in self.readers.items():
            memory.check(self.twin.table(handle), reader)
        memory.check_known(self.twin._index, self.twin.host.slots)

    def teardown(self) -> None:
        """All that sequences held comes back."""
        if hasattr(self, "pool"):
            while self.readers:
                self.release(0)
            self.agrees()
            assert self.pool.num_free == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_refuses_unknown_handles() -> None:
    pool = extension.BlockPool(4, 4)
    handle = pool.create()
    pool.release(handle)
    for call in (pool.release, pool.table):
        with pytest.raises(ValueError, match="unknown sequence"):
            call(handle)


def test_refuses_what_are_no_tokens_before_anything_changed() -> None:
    pool = extension.BlockPool(4, 4)
    handles = [pool.create(), pool.create()]
    for bad, error in (("x", TypeError), (2**40, ValueError)):
        with pytest.raises(error):
            pool.admit(handles, [[1, 2], [1, bad]], [0, 0], [2, 2], [True, True])
        assert [pool.table(handle) for handle in handles] == [[], []]


def test_a_table_stands_once_in_an_admission() -> None:
    pool = extension.BlockPool(4, 4)
    handle = pool.create()
    with pytest.raises(ValueError, match="empty tables"):
        pool.admit([handle, handle], [[1], [1]], [0, 0], [1, 1], [True, True])
    with pytest.raises(ValueError, match="one entry per handle"):
        pool.admit([handle], [[1]], [0], [1], [])
    assert pool.num_free == 4


def test_a_full_hit_leaves_a_token_to_compute() -> None:
    pool = extension.BlockPool(8, 4)
    first, second = pool.create(), pool.create()
    text = list(range(8))
    assert pool.admit([first], [text], [0], [8], [True]) == [0]
    pool.commit(first, text, 8)
    assert pool.match(text, 0) == 4
    assert pool.match([*text, 9], 0) == 8
    assert pool.admit([second], [text], [0], [8], [True]) == [4]
    assert pool.table(second)[0] == pool.table(first)[0]
    assert pool.table(second)[1] != pool.table(first)[1]
    pool.commit(second, text, 8)
    assert pool.num_cached == 2, "the second block of the second sequence stays private"


def test_salts_and_partial_blocks_are_not_shared() -> None:
    pool = extension.BlockPool(8, 4)
    handle, text = pool.create(), [1, 2, 3, 4, 5, 6, 7]
    pool.admit([handle], [text], [7], [7], [True])
    pool.commit(handle, text, 7)
    assert pool.num_cached == 1
    assert pool.match([*text, 8, 9], 7) == 4
    assert pool.match([*text, 8, 9], 8) == 0
    assert pool.match([2, *text[1:]], 7) == 0


def test_admission_may_evict_what_a_later_one_would_have_matched_but_not_what_it_matched() -> None:
    pool = extension.BlockPool(4, 2)
    texts = ([1, 1, 1], [2, 2, 2])
    for text in texts:
        handle = pool.create()
        pool.admit([handle], [text], [0], [3], [True])
        pool.commit(handle, text, 3)
        pool.release(handle)
    assert [pool.match(text, 0) for text in texts] == [2, 2]
    first, second = pool.create(), pool.create()
    # The first matches its block (older) and needs three more: the second's block must go, and then it does not fit.
    assert pool.admit([first, second], [[1, 1, *[3] * 5], texts[1]], [0, 0], [7, 3], [True, True]) == [2]
    assert pool.match(texts[1], 0) == 0
    assert pool.table(second) == []
    pool.check_integrity()


def test_the_block_touched_last_is_evicted_last() -> None:
    pool = extension.BlockPool(3, 2)
    for token in (1, 2, 3):
        handle = pool.create()
        pool.admit([handle], [[token] * 2], [0], [2], [True])
        pool.commit(handle, [token] * 2, 2)
        pool.release(handle)
    handle = pool.create()
    assert pool.admit([handle], [[1] * 3], [0], [2], [True]) == [2]  # touches the oldest
    pool.release(handle)
    pool.reserve([pool.create()], [2])
    assert [pool.match([token] * 3, 0) for token in (1, 2, 3)] == [2, 0, 2]


def test_a_reset_forgets_also_what_running_sequences_will_compute() -> None:
    pool = extension.BlockPool(8, 2)
    handle = pool.create()
    pool.admit([handle], [[1, 1, 1, 1]], [0], [4], [True])
    pool.commit(handle, [1, 1, 1, 1], 2)
    pool.reset_cache()
    pool.commit(handle, [1, 1, 1, 1], 4)
    assert pool.num_cached == 0
    assert pool.match([1] * 5, 0) == 0


def test_the_hash_depends_on_the_key_of_the_deployment() -> None:
    with pytest.raises(OverflowError):
        extension.BlockPool(4, 4, 2**128)
    with pytest.raises(OverflowError):
        extension.BlockPool(4, 4, -1)


def test_an_aborted_copy_keeps_its_source_until_it_is_taken() -> None:
    pool = extension.BlockPool(3, 4)
    parent = pool.create()
    pool.admit([parent], [[1] * 6], [0], [6], [True])
    source = pool.table(parent)[1]
    child = pool.fork(parent, 6)
    pool.release(parent)
    assert pool.num_free == 0
    with pytest.raises(MemoryError):
        pool.fork(child, 5)
    assert pool.take_copies() == [(source, pool.table(child)[1])]
    assert pool.num_free == 1


def test_synced_tables_tell_what_changed() -> None:
    pool = extension.BlockPool(16, 4)
    handles = [pool.create() for _ in range(3)]
    pool.reserve(handles, [9, 3, 16])
    tables = np.full((4, 5), -1, np.int32)
    pool.sync_tables(handles, tables)
    assert [row[row >= 0].tolist() for row in tables] == [*map(pool.table, handles), []]
    assert len(pool.sync_tables(handles, tables)) == 0
    pool.reserve([handles[1]], [5])
    assert pool.sync_tables(handles, tables).tolist() == [5 + 1]
    reference = tables.copy()
    changed = pool.sync_tables(handles[::-1], tables)
    assert changed.tolist() == np.flatnonzero(tables != reference).tolist()
    assert [row[: len(pool.table(handle))].tolist() for row, handle in zip(tables, handles[::-1], strict=False)] == [
        *map(pool.table, handles[::-1])
    ]


@pytest.mark.parametrize("tables", [np.zeros((2, 4), np.int64), np.zeros((2, 2), np.int32), np.zeros((1, 4), np.int32)])
def test_tables_that_cannot_take_the_blocks_are_refused(tables: np.ndarray) -> None:
    pool = extension.BlockPool(16, 4)
    handles = [pool.create(), pool.create()]
    pool.reserve(handles, [9, 3])
    with pytest.raises(ValueError, match=r"^tables: "):
        pool.sync_tables(handles, tables)

"""Cached blocks that move to the host and back, case by case; at random in `test_block_pool`."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.engine.test_block_pool import PoolMachine
from tests.ops.seeds import fresh_seed

if TYPE_CHECKING:
    from llmserve._C import BlockPool

extension = pytest.importorskip("llmserve._C", reason="the extension is not built")

SIZE = 2


def compute(pool: BlockPool, token: int, num_blocks: int = 1) -> int:
    """Handle of a sequence that has computed full blocks of one token."""
    handle, text = pool.create(), [token] * (num_blocks * SIZE)
    assert len(pool.admit([handle], [text], [0], [len(text)], [True])) == 1
    pool.commit(handle, text, len(text))
    return handle


def leave(pool: BlockPool, *tokens: int, num_blocks: int = 1) -> None:
    """Sequences that have computed their blocks and ended, one after another."""
    for token in tokens:
        pool.release(compute(pool, token, num_blocks))


def cached(pool: BlockPool, token: int, num_blocks: int = 1) -> int:
    """Tokens found of those blocks."""
    return pool.match([token] * (num_blocks * SIZE + 1), 0)


def admit(pool: BlockPool, token: int, num_tokens: int) -> tuple[int, int]:
    """Handle of an admitted sequence of one token, and how much of it was cached."""
    handle = pool.create()
    (num_cached,) = pool.admit([handle], [[token] * num_tokens], [0], [num_tokens], [True])
    return handle, num_cached


def act(machine: PoolMachine, choose: random.Random) -> None:
    """One action of a busy engine with few blocks: sequences end soon after they came, and their like return."""
    number = choose.randrange(1000)
    text = choose.choices((0, 1), k=choose.randint(1, 14))
    action = choose.random()
    if not machine.readers or action < 0.15:
        texts = [(text[: choose.randint(1, 14)], 0, True) for _ in range(choose.randint(1, 3))]
        machine.admit(texts, 0)
    elif machine.twin.host.slots and action < 0.35:
        machine.admit_from_host([number, number + 1], text[:2])
    elif action < 0.6:
        machine.step([(number, choose.randint(1, 9)), (number + 1, choose.randint(1, 9))])
    elif action < 0.87:
        machine.release(number)
    elif action < 0.91:
        machine.fork(number, choose.randrange(5), text)
    elif action < 0.95:
        machine.truncate(number, choose.randrange(12), text)
    elif action < 0.99:
        machine.discard(number, choose.random() < 0.5)
    else:
        machine.reset_cache()


@pytest.mark.parametrize("num_host_blocks", [1, 2, 5, 20])
def test_blocks_hold_what_they_should_over_long_random_runs(num_host_blocks: int) -> None:
    seed = fresh_seed()
    choose = random.Random(seed)
    moved: Counter[str] = Counter()
    try:
        for _ in range(30):
            machine = PoolMachine()
            machine.begin(choose.randint(2, 8), choose.randint(1, 3), num_host_blocks)
            for _ in range(150):
                act(machine, choose)
                machine.agrees()
                machine.blocks_hold_what_they_should()
            machine.teardown()
            moved += machine.memory.num_moved
    except (AssertionError, RuntimeError, KeyError) as error:
        error.add_note(f"seed {seed}")
        raise
    assert min(moved["to_host"], moved["to_device"]) > 50, f"seed {seed}: the runs were too tame: {moved}"


def test_what_was_evicted_is_found_on_the_host_and_brought_back() -> None:
    pool = extension.BlockPool(2, SIZE, num_host_blocks=4)
    leave(pool, 1, num_blocks=2)
    first, second = 0, 1  # blocks in the order they are handed out
    leave(pool, 2, num_blocks=2)
    # The end of a sequence is evicted before its beginning.
    assert pool.take_transfers() == [("to_host", second, 0), ("to_host", first, 1)]
    assert (pool.num_cached, pool.num_host_cached) == (2, 2)
    assert cached(pool, 1, 2) == cached(pool, 2, 2) == 4
    handle, num_cached = admit(pool, 1, 4)
    assert num_cached == 2, "one token is left to compute, and so its block"
    beginning, end = pool.table(handle)
    assert pool.take_transfers() == [("to_host", beginning, 2), ("to_device", 1, beginning), ("to_host", end, 3)]
    assert pool.take_new_blocks() == [end], "what the host fills is not zeroed"
    pool.check_integrity()


def test_without_host_blocks_nothing_moves() -> None:
    pool = extension.BlockPool(1, SIZE)
    leave(pool, 1, 2, 3)
    assert pool.take_transfers() == []
    assert (pool.num_host_blocks, pool.num_host_cached, cached(pool, 1)) == (0, 0, 0)
    with pytest.raises(ValueError, match="num_host_blocks"):
        extension.BlockPool(1, SIZE, num_host_blocks=-1)


def test_transfers_wait_for_a_step_that_takes_them() -> None:
    pool = extension.BlockPool(1, SIZE, num_host_blocks=2)
    leave(pool, 1, 2)
    pool.take_copies()
    pool.take_new_blocks()
    leave(pool, 3)
    assert pool.take_transfers() == [("to_host", 0, 0), ("to_host", 0, 1)]
    assert pool.take_transfers() == []


def test_a_chain_goes_on_over_device_and_host() -> None:
    pool = extension.BlockPool(4, SIZE, num_host_blocks=4)
    leave(pool, 1, num_blocks=3)
    holder, _ = admit(pool, 1, 3)  # the first block and a new one
    leave(pool, 2, num_blocks=2)  # evicts the other two
    pool.release(holder)
    assert pool.take_transfers() == [("to_host", 2, 0), ("to_host", 1, 1)]
    handle, num_cached = admit(pool, 1, 7)
    assert num_cached == 6
    device = [place for place in pool.take_transfers() if place[0] == "to_device"]
    assert device == [("to_device", 1, pool.table(handle)[1]), ("to_device", 0, pool.table(handle)[2])]


def test_the_only_slot_is_read_before_what_it_makes_room_for_overwrites_it() -> None:
    pool = extension.BlockPool(2, SIZE, num_host_blocks=1)
    leave(pool, 1, 2, 3)
    assert pool.take_transfers() == [("to_host", 0, 0)]
    handle, num_cached = admit(pool, 1, 4)  # matches slot 0 and evicts both blocks
    assert num_cached == 2
    first, second = pool.table(handle)
    # The first eviction finds the slot pinned and is lost; the second overwrites what is read by then.
    assert pool.take_transfers() == [("to_device", 0, first), ("to_host", second, 0)]
    assert [cached(pool, token) for token in (1, 2, 3)] == [2, 0, 2]
    pool.check_integrity()


def test_what_came_back_and_leaves_again_costs_no_transfer() -> None:
    pool = extension.BlockPool(1, SIZE, num_host_blocks=2)
    leave(pool, 1, 2)
    for token in (1, 2, 1, 2):
        handle = pool.create()
        assert pool.admit([handle], [[token] * 3], [0], [2], [True]) == [2]
        pool.release(handle)
    kinds = [kind for kind, _, _ in pool.take_transfers()]
    assert kinds == ["to_host", "to_host", *["to_device"] * 4]


def test_a_content_that_the_device_has_too_is_overwritten_first() -> None:
    pool = extension.BlockPool(2, SIZE, num_host_blocks=2)
    leave(pool, 1, 2, 3, 4)
    assert pool.num_host_cached == 2  # 1 and 2; the device has 3 and 4
    handle = pool.create()
    pool.admit([handle], [[2] * 3], [0], [2], [True])  # 2 comes back, and 3 takes the place of the colder 1
    assert [cached(pool, token) for token in (1, 2, 3, 4)] == [0, 2, 2, 2]
    leave(pool, 5)  # evicts 4, which overwrites the copy of 2: 3 stays though it is older
    assert [cached(pool, token) for token in (2, 3, 4, 5)] == [2, 2, 2, 2]
    pool.check_integrity()


def test_a_block_evicted_before_the_host_filled_it_has_its_transfers_in_order() -> None:
    pool = extension.BlockPool(1, SIZE, num_host_blocks=1)
    leave(pool, 1, 2)
    pool.take_transfers()
    for token in (1, 2):
        handle = pool.create()
        assert pool.admit([handle], [[token] * 3], [0], [2], [True]) == [2 if token == 1 else 0]
        pool.release(handle)
    # 1 came back; 2 was lost then, for the only slot was being read. No transfer is needed for 1 to leave again.
    assert pool.take_transfers() == [("to_device", 0, 0)]
    assert cached(pool, 1) == 2


def test_poisoned_blocks_are_on_neither_side() -> None:
    pool = extension.BlockPool(2, SIZE, num_host_blocks=4)
    leave(pool, 1, 2, 3)
    handle, num_cached = admit(pool, 1, 3)
    assert num_cached == 2
    assert pool.num_host_cached == 3, "1 stays there while it is on the device"
    pool.discard(handle)
    assert cached(pool, 1) == 0
    assert pool.num_host_cached == 2
    pool.take_transfers()
    poisoned = compute(pool, 4)
    pool.discard(poisoned)
    leave(pool, 5, num_blocks=2)
    assert pool.take_transfers() == [], "nothing that was known is handed out"
    pool.check_integrity()


def test_a_reset_forgets_the_host() -> None:
    pool = extension.BlockPool(1, SIZE, num_host_blocks=1)
    leave(pool, 1, 2)
    handle = pool.create()
    pool.admit([handle], [[1] * 3], [0], [2], [True])
    pool.take_copies()
    pool.reset_cache()
    assert (pool.num_host_cached, cached(pool, 1), cached(pool, 2)) == (0, 0, 0)
    assert pool.take_transfers() == [("to_host", 0, 0), ("to_device", 0, 0)], "the sequence still needs it"
    pool.release(handle)
    pool.check_integrity()

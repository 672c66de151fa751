"""The compiled block pool against its Python twin."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.block_pool_twin import BlockPoolTwin

extension = pytest.importorskip("llmserve._C", reason="the extension is not built")

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), st.none()),
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("truncate"), st.tuples(st.integers(0, 30), st.integers(0, 60))),
        st.tuples(st.just("reserve"), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), max_size=5)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(num_blocks=st.integers(1, 20), block_size=st.sampled_from([1, 4, 16]), operations=OPERATIONS)
def test_equals_its_twin(num_blocks: int, block_size: int, operations: list[tuple[str, object]]) -> None:
    pool, twin = extension.BlockPool(num_blocks, block_size), BlockPoolTwin(num_blocks, block_size)
    handles: list[tuple[int, int]] = []
    for verb, argument in operations:
        if verb == "create":
            handles.append((pool.create(), twin.create()))
        elif verb == "release" and handles:
            assert isinstance(argument, int)
            real, mirrored = handles.pop(argument % len(handles))
            pool.release(real)
            twin.release(mirrored)
        elif verb == "truncate" and handles:
            assert isinstance(argument, tuple)
            real, mirrored = handles[argument[0] % len(handles)]
            pool.truncate(real, argument[1])
            twin.truncate(mirrored, argument[1])
        elif verb == "reserve" and handles:
            assert isinstance(argument, list)
            chosen = {index % len(handles): tokens for index, tokens in argument}
            tokens = list(chosen.values())
            count = pool.reserve([handles[index][0] for index in chosen], tokens)
            assert count == twin.reserve([handles[index][1] for index in chosen], tokens)
        pool.check_integrity()
        assert pool.num_free == twin.num_free
        tables = [(pool.table(real), twin.table(mirrored)) for real, mirrored in handles]
        assert [len(table) for table, _ in tables] == [len(mirrored) for _, mirrored in tables]
        held = [block for table, _ in tables for block in table]
        assert len(set(held)) == len(held)


def test_refuses_unknown_handles() -> None:
    pool = extension.BlockPool(4, 4)
    handle = pool.create()
    pool.release(handle)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        pool.release(handle)

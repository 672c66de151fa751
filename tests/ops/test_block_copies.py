"""Forked sequences in the executors: both go on in the step that copies their last block, as if each were alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve import ops
from llmserve.config import ExecutorConfig
from llmserve.ops.protocol import Executor
from tests.ops.networks import MAX_LEN, NETWORKS, VOCAB, Maker
from tests.ops.running import Piece, make_step, new_sequence

pytest.importorskip("llmserve._C", reason="the extension is not built")

PROMPT = [3 * number % VOCAB for number in range(21)]
PARENT = [(5 + number) % VOCAB for number in range(14)]
CHILD = [(40 + 2 * number) % VOCAB for number in range(14)]


@pytest.fixture(params=["cpu", "reference"])
def executor(request: pytest.FixtureRequest) -> Executor:
    config = ExecutorConfig(max_num_tokens=64, max_num_seqs=4, max_logit_rows=64, max_model_len=MAX_LEN, num_threads=2)
    no_config: Any = None  # the forward says it all
    forward = NETWORKS["llama_layers"].build(Maker(7, "q8_0"))
    executor = ops.load(request.param).build(no_config, forward, config, progress=lambda what, done, total: None)
    executor.allocate_kv(12)
    return executor


def logprobs(executor: Executor, *pieces: Piece) -> NDArray[np.float32]:
    """[T, VOCAB], in the order of token ids."""
    executor.launch(make_step(pieces, num_logprobs=VOCAB))
    output = executor.collect()
    return np.take_along_axis(output.top_logprobs, np.argsort(output.top_ids, axis=1), axis=1)


def alone(executor: Executor, token_ids: list[int]) -> NDArray[np.float32]:
    """What follows the prompt, by a sequence that never forked."""
    handle = new_sequence(executor, len(PROMPT) + len(token_ids))
    logprobs(executor, Piece(handle, PROMPT, 0))
    after = logprobs(executor, Piece(handle, token_ids, len(PROMPT)))
    executor.block_pool.release(handle)  # type: ignore[attr-defined]
    return after


def test_parent_and_child_go_on_in_the_step_that_copies(executor: Executor) -> None:
    pool = executor.block_pool  # type: ignore[attr-defined]
    parent = new_sequence(executor, len(PROMPT))
    logprobs(executor, Piece(parent, PROMPT, 0))
    child = pool.fork(parent, len(PROMPT))
    assert pool.table(child)[0] == pool.table(parent)[0]
    assert pool.table(child)[1] != pool.table(parent)[1]
    assert pool.reserve([parent, child], [len(PROMPT) + 14] * 2) == 2
    both = logprobs(executor, Piece(parent, PARENT, len(PROMPT)), Piece(child, CHILD, len(PROMPT)))
    assert pool.take_copies() == []
    expected = np.concatenate([alone(executor, PARENT), alone(executor, CHILD)])
    np.testing.assert_allclose(both, expected, atol=0 if executor.isa != "numpy" else 1e-4)


def test_a_step_that_is_refused_leaves_the_copy_to_the_next(executor: Executor) -> None:
    pool = executor.block_pool  # type: ignore[attr-defined]
    parent = new_sequence(executor, len(PROMPT))
    logprobs(executor, Piece(parent, PROMPT, 0))
    child = pool.fork(parent, len(PROMPT))
    pool.release(parent)
    assert pool.reserve([child], [len(PROMPT) + 14]) == 1
    step = make_step([Piece(child, CHILD, len(PROMPT))], num_logprobs=VOCAB)
    step.block_tables[0] = 999
    with pytest.raises(ValueError, match="unknown sequence"):
        executor.launch(step)
    after = logprobs(executor, Piece(child, CHILD, len(PROMPT)))
    np.testing.assert_allclose(after, alone(executor, CHILD), atol=0 if executor.isa != "numpy" else 1e-4)


def test_a_cached_prefix_gives_what_computing_it_gives(executor: Executor) -> None:
    pool = executor.block_pool  # type: ignore[attr-defined]
    text, first, second = PROMPT + CHILD, pool.create(), pool.create()
    assert pool.admit([first], [text], [0], [len(text)], [True]) == [0]
    whole = logprobs(executor, Piece(first, text, 0))
    pool.commit(first, text, len(text))
    assert pool.admit([second], [text], [0], [len(text)], [True]) == [32]
    rest = logprobs(executor, Piece(second, text[32:], 32))
    np.testing.assert_allclose(rest, whole[32:], atol=0 if executor.isa != "numpy" else 1e-4)


def test_a_step_zeroes_the_blocks_that_it_reaches(executor: Executor) -> None:
    if executor.isa == "numpy":
        pytest.skip("the reference has a cache of its own")
    pool = executor.block_pool  # type: ignore[attr-defined]
    handle = new_sequence(executor, len(PROMPT))
    table = pool.table(handle)
    assert len(table) == 2
    logprobs(executor, Piece(handle, PROMPT[:10], 0))
    logprobs(executor, Piece(handle, PROMPT[10:12], 10))
    assert pool.take_new_blocks() == table[1:]

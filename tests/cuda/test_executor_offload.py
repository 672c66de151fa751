"""Prefixes that come back from the host into the CUDA executor's cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.cuda.networks import NUM_BLOCKS, load
from tests.ops.golden import tiny_golden
from tests.ops.running import Piece, make_step, new_sequence
from tests.tiny.models import VOCAB_SIZE

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_prefix_that_comes_back_from_the_host_is_as_it_was(dtype: str, launchers: Launchers, tmp_path: Path) -> None:
    executor = load("llama", launchers, tmp_path, kv_cache_dtype=dtype, host_kv_cache_bytes=1 << 20)
    pool, prompt = executor.block_pool, tiny_golden("llama").prompt
    assert pool is not None
    assert pool.num_host_blocks > 0
    first = new_sequence(executor, len(prompt))
    executor.launch(make_step([Piece(first, prompt, 0)], num_logprobs=VOCAB_SIZE))
    expected = executor.collect()
    pool.commit(first, prompt, len(prompt))
    pool.release(first)
    others = [pool.create() for _ in range(NUM_BLOCKS // 8)]
    assert pool.reserve(others, [8 * pool.block_size] * len(others)) == len(others), "every block changes hands"
    executor.launch(make_step([Piece(others[0], [1] * 64, 0)], num_logprobs=0))
    executor.collect()
    for tensor in executor.cache.tensors():
        tensor.fill_(7)
    for handle in others:
        pool.release(handle)
    again = pool.create()
    (num_cached,) = pool.admit([again], [prompt], [0], [len(prompt)], [True])
    assert num_cached == len(prompt) // pool.block_size * pool.block_size > 0
    executor.launch(make_step([Piece(again, prompt[num_cached:], num_cached)], num_logprobs=VOCAB_SIZE))
    output = executor.collect()
    found, want = (
        np.take_along_axis(part.top_logprobs, np.argsort(part.top_ids, axis=1), axis=1) for part in (output, expected)
    )
    np.testing.assert_allclose(found, want[num_cached:], atol=0.02)

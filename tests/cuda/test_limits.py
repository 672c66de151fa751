"""What the executor refuses or survives at the edges of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llmserve.errors import CheckpointError
from llmserve.ops import Forward
from llmserve.ops.protocol import AttentionSpec, Ops, Value
from tests.cuda.networks import load
from tests.ops.networks import VOCAB, Maker
from tests.ops.running import Piece, make_step, new_sequence
from tests.ops.seeds import fresh_seed

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers


@pytest.mark.parametrize("num_seqs", [1, 3])
def test_the_largest_step_has_no_more_sequences_than_a_step_can_have(
    num_seqs: int, fast_launchers: Launchers, tmp_path: Path
) -> None:
    executor = load("llama", fast_launchers, tmp_path, max_num_tokens=256, max_num_seqs=num_seqs, max_model_len=64)
    assert executor._run_largest_step() == executor.kv_bytes_per_block() * 4 * num_seqs
    executor.allocate_kv(8)
    executor.launch(make_step([Piece(new_sequence(executor, 3), [1, 2, 3], 0)], num_logprobs=1))
    assert np.isfinite(executor.collect().logprobs).all()


def test_layers_of_other_groups_are_refused(fast_launchers: Launchers) -> None:
    from llmserve.config import ExecutorConfig
    from llmserve.ops.cuda.executor import CudaExecutor

    maker = Maker(fresh_seed(), "bf16")
    table, head = maker.table(VOCAB, maker.hidden), maker.matrix(VOCAB, maker.hidden)
    parts = [[maker.matrix(32 * heads, maker.hidden) for heads in (2, kv, kv)] for kv in (1, 2)]
    outs = [maker.matrix(maker.hidden, 64) for _ in range(2)]

    def build() -> Forward:
        def forward(ops: Ops) -> Value:
            x = ops.embed(table)
            for layer, (weights, out) in enumerate(zip(parts, outs, strict=True)):
                spec = AttentionSpec(heads=2, kv_heads=layer + 1, head_dim=32, scale=0.2)
                q, k, v = (ops.linear(x, weight) for weight in weights)
                x = ops.linear(ops.attention(q, k, v, spec, layer=layer), out, residual=x)
            return ops.logits(x, head)

        return forward

    with pytest.raises(CheckpointError, match="layers that differ in query heads per KV head"):
        CudaExecutor(build(), ExecutorConfig(), fast_launchers, progress=lambda what, done, total: None)


def test_a_graph_has_room_for_as_many_splits_as_it_was_captured_with(fast_launchers: Launchers, tmp_path: Path) -> None:
    from llmserve.ops.cuda.step import DETERMINISTIC_SPLIT, SPARE_WORK

    chosen = load("llama", fast_launchers, tmp_path).builder
    fixed = load("llama", fast_launchers, tmp_path, deterministic=True).builder
    longest = np.full(8, SPARE_WORK // 8 * DETERMINISTIC_SPLIT, np.int32)
    assert chosen.fits_graph(longest * 100)
    assert fixed.fits_graph(longest)
    assert not fixed.fits_graph(longest + 1)


def test_every_full_batch_has_a_graph() -> None:
    from llmserve.ops.cuda.graphs import graph_sizes

    for num_seqs in (1, 2, 3, 20, 100, 128, 256, 300):
        sizes = graph_sizes(num_seqs)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == num_seqs
    assert graph_sizes(1000)[-1] == 512

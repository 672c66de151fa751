"""Runs a network in an executor and compares its log-probabilities with golden ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve import ops
from llmserve.config import ExecutorConfig, ModelConfig
from llmserve.ops.protocol import Executor, StepInput, StepOutput
from llmserve.ops.reference import ReferenceExecutor
from tests.ops.bounds import Bound

ISAS: Final = ("scalar", "avx2", "avx512", "amx")
"""Kernel tables, each with all that those before it have."""
ARMS: Final = ("reference", *(f"cpu-{isa}{mode}" for isa in ISAS for mode in ("", "-exact")))
"""Executors that must agree with the golden values: executor, highest instruction set, activations."""


class ScatteredBlocks:
    """Block tables for a few sequences of `blocks_per_sequence` blocks, interleaved so that no table is contiguous."""

    def __init__(self, num_sequences: int, blocks_per_sequence: int) -> None:
        self._num_sequences, self._length = num_sequences, blocks_per_sequence

    def table(self, handle: int) -> Sequence[int]:
        return [self._num_sequences * (self._length - 1 - index) + handle for index in range(self._length)]

    def take_copies(self) -> list[tuple[int, int]]:
        return []


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of one sequence, in one step."""

    handle: int
    token_ids: Sequence[int]
    start: int


def make_step(pieces: Sequence[Piece], *, num_logprobs: int, targets: Sequence[int] | None = None) -> StepInput:
    """A greedy step in which every token needs logits."""
    lengths = [len(piece.token_ids) for piece in pieces]
    num_tokens = sum(lengths)
    positions = np.concatenate([np.arange(piece.start, piece.start + len(piece.token_ids)) for piece in pieces])
    return StepInput(
        token_ids=np.concatenate([np.asarray(piece.token_ids, np.int32) for piece in pieces]),
        positions=positions.astype(np.int32),
        query_start=np.cumsum([0, *lengths]).astype(np.int32),
        seq_lens=np.array([piece.start + len(piece.token_ids) for piece in pieces], np.int32),
        block_tables=np.array([piece.handle for piece in pieces], np.int64),
        logit_rows=np.arange(num_tokens, dtype=np.int32),
        targets=np.full(num_tokens, -1, np.int32) if targets is None else np.asarray(targets, np.int32),
        temperature=np.zeros(num_tokens, np.float32),
        top_k=np.zeros(num_tokens, np.int32),
        top_p=np.ones(num_tokens, np.float32),
        min_p=np.zeros(num_tokens, np.float32),
        seed=np.zeros(num_tokens, np.uint64),
        sample_position=(positions + 1).astype(np.int64),
        num_logprobs=np.full(num_tokens, num_logprobs, np.int32),
    )


def available_isas() -> list[str]:
    """Kernel tables that this machine has, by name."""
    from llmserve import _C

    return list(ISAS[: ISAS.index(_C.best_isa()) + 1])


def skip_without(isa: str) -> None:
    """Skips the test where the machine has no such kernels; an empty name stands for the best it has."""
    if isa and isa not in available_isas():
        pytest.skip(f"this machine has no {isa}")


def build_executor(
    arm: str, config: ModelConfig, forward: ops.Forward, *, num_tokens: int, num_blocks: int, block_size: int = 16
) -> Executor:
    """The executor of an arm with an allocated cache; `cpu-best` is the CPU executor's own choice of instructions.

    Skips the test if the arm cannot run here, saying why.
    """
    name, _, rest = arm.partition("-")
    isa, _, mode = rest.removeprefix("best").partition("-")
    executor_config = ExecutorConfig(
        max_num_tokens=num_tokens, max_num_seqs=8, max_logit_rows=num_tokens, max_model_len=max(128, num_tokens),
        block_size=block_size, num_threads=2, exact=mode == "exact", isa=isa,
    )  # fmt: skip
    if name == "cpu" and not (find_spec("llmserve._C") and find_spec("llmserve.ops.cpu")):
        pytest.skip("the CPU executor is not built")
    if name == "cpu" and isa:
        skip_without(isa)
    executor = ops.load(name).build(config, forward, executor_config, progress=lambda what, done, total: None)
    assert name != "cpu" or isa in ("", executor.isa)
    if isinstance(executor, ReferenceExecutor):
        executor.block_pool = ScatteredBlocks(8, num_blocks // 8)
    executor.allocate_kv(num_blocks)
    return executor


def new_sequence(executor: Executor, num_tokens: int, *, index: int = 0) -> int:
    """A handle whose table covers `num_tokens`."""
    pool = getattr(executor, "block_pool", None)
    if isinstance(pool, ScatteredBlocks):
        return index
    assert pool is not None
    handle = cast(int, pool.create())
    assert pool.reserve([handle], [num_tokens]) == 1
    return handle


def prompt_logprobs(
    executor: Executor, prompt: Sequence[int], *, chunks: Iterable[int], vocab_size: int
) -> NDArray[np.float32]:
    """Log-probabilities of all tokens after each prompt token, [T, vocab]. The prompt is computed in `chunks`."""
    handle = new_sequence(executor, len(prompt))
    table = np.full((len(prompt), vocab_size), np.nan, np.float32)
    start = 0
    for size in chunks:
        token_ids = prompt[start : start + size]
        executor.launch(make_step([Piece(handle, token_ids, start)], num_logprobs=vocab_size))
        _fill(table[start : start + size], executor.collect())
        start += size
    assert start == len(prompt)
    return table


def _fill(table: NDArray[np.float32], output: StepOutput) -> None:
    np.put_along_axis(table, output.top_ids.astype(np.int64), output.top_logprobs, axis=1)


def errors(measured: NDArray[np.float32], golden: NDArray[np.float32]) -> Bound:
    """Mean and largest absolute difference of log-probabilities."""
    difference = np.abs(measured.astype(np.float64) - golden)
    return Bound(mean=float(difference.mean()), max=float(difference.max()))

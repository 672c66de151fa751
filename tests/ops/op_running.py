"""Runs a small network in the CPU executor, with its nodes in reach of a planted mistake, and in the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from llmserve import _C
from llmserve.config import ExecutorConfig
from llmserve.ops import Forward
from llmserve.ops import nodes as n
from llmserve.ops.compiler import Compiler, Plan
from llmserve.ops.cpu import CpuExecutor
from llmserve.ops.emit import Emitter
from llmserve.ops.protocol import Executor
from llmserve.ops.reference import ReferenceExecutor
from llmserve.ops.tape import TapeBuilder
from tests.ops.bounds import Bound
from tests.ops.networks import MAX_LEN, VOCAB, Maker, Network, WeightType
from tests.ops.running import Piece, ScatteredBlocks, make_step, new_sequence

NUM_TOKENS: Final = 41
CHUNKS: Final = (1, 17, 23)
Logits = NDArray[np.float32]
Mutation = Callable[[Plan], None]


def executor_config(isa: str = "", *, exact: bool = False) -> ExecutorConfig:
    return ExecutorConfig(max_num_tokens=NUM_TOKENS, max_num_seqs=4, max_logit_rows=NUM_TOKENS, max_model_len=MAX_LEN,
                          num_threads=2, exact=exact, isa=isa)  # fmt: skip


def compile_plan(forward: Forward, *, exact: bool) -> Plan:
    tape = TapeBuilder()
    forward(tape)
    return Compiler(tape.ops, exact).run()


class OpenCpuExecutor:
    """The CPU executor put together as `ops.cpu.build` does, with the logits readable."""

    def __init__(self, forward: Forward, config: ExecutorConfig, mutate: Mutation = lambda plan: None) -> None:
        plan = compile_plan(forward, exact=config.exact)
        mutate(plan)
        program = _C.Program(
            config.isa, config.num_threads, max_num_tokens=config.max_num_tokens, max_num_seqs=config.max_num_seqs,
            max_logit_rows=config.max_logit_rows, max_position=config.max_model_len,
        )  # fmt: skip
        emitter = Emitter(program, config, exact=config.exact)
        emitter.place(plan.nodes)
        weights = emitter.load(plan.nodes, lambda what, done, total: None)
        for node in plan.nodes:
            emitter.add(node)
        self.executor = CpuExecutor(program, plan.attention, weights, weight_bytes=emitter.weight_bytes)
        self.executor.allocate_kv(16)
        sample = plan.nodes[-1]
        assert isinstance(sample, n.SampleNode)
        self._values = emitter._values
        self._logits = self._values[sample.reads[0]]

    def logits(self, num_rows: int) -> Logits:
        """Of the step launched last, [num_rows, VOCAB]."""
        return self.executor.program.read(self._logits, num_rows)


def cpu_logits(
    forward: Forward, token_ids: Sequence[int], config: ExecutorConfig, mutate: Mutation = lambda plan: None
) -> Logits:
    """Logits after every token, [T, VOCAB], computed in chunks."""
    opened = OpenCpuExecutor(forward, config, mutate)
    handle = new_sequence(cast(Executor, opened.executor), len(token_ids))
    rows, start = [], 0
    for size in CHUNKS:
        opened.executor.launch(make_step([Piece(handle, token_ids[start : start + size], start)], num_logprobs=-1))
        rows.append(opened.logits(size))
        start += size
    return np.concatenate(rows)


def reference_logits(forward: Forward, token_ids: Sequence[int]) -> Logits:
    """The same by the reference executor."""
    executor = ReferenceExecutor(forward, executor_config(), progress=lambda what, done, total: None)
    executor.block_pool = ScatteredBlocks(1, 4)
    executor.allocate_kv(4)
    return executor.run(make_step([Piece(0, token_ids, 0)], num_logprobs=-1))


def draw(network: Network, seed: int, weight_type: WeightType) -> tuple[Forward, list[int]]:
    """A network and a prompt."""
    maker = Maker(seed, weight_type)
    forward = network.build(maker)
    return forward, maker.random.integers(0, VOCAB, NUM_TOKENS).tolist()


def deviation(measured: Logits, expected: Logits) -> Bound:
    """Mean and largest difference, in standard deviations of the expected logits."""
    difference = np.abs(measured.astype(np.float64) - expected) / expected.std()
    return Bound(mean=float(difference.mean()), max=float(difference.max()))

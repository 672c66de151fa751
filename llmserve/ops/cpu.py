"""The CPU executor: the forward pass recorded on a tape, compiled once, and run as one call per step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import cast

import numpy as np

from llmserve import _C
from llmserve.config import ExecutorConfig, ModelConfig
from llmserve.errors import InvalidRequest, OutOfMemory
from llmserve.ops import Forward, Progress
from llmserve.ops.compiler import Compiler
from llmserve.ops.emit import Emitter
from llmserve.ops.nodes import AttentionNode
from llmserve.ops.protocol import StepInput, StepOutput
from llmserve.ops.tape import TapeBuilder
from llmserve.ops.weights import LoadedWeights
from llmserve.types import WeightsOrigin

BLOCK_SIZE = 16
"""Tokens of a KV block in this executor's layout."""


class CpuExecutor:
    """A compiled network. `block_pool` appears with `allocate_kv`."""

    def __init__(
        self,
        program: _C.Program,
        attention: list[AttentionNode],
        weights: LoadedWeights,
        *,
        weight_bytes: int,
        kv_int8: bool = False,
    ) -> None:
        self.program = program
        self.weights_origin: WeightsOrigin = weights.origin
        self.image_path = str(weights.image.path) if weights.image is not None else ""
        self._weights = weights  # holds the image's lock
        self.weight_bytes = weight_bytes
        self.isa: str = program.isa
        self.num_threads: int = program.num_threads
        self.block_pool: _C.BlockPool | None = None
        self._spec = attention[0].spec
        self._num_layers = len(attention)
        self._kv_int8 = kv_int8
        self._output: StepOutput | None = None
        self._lease: contextlib.AbstractContextManager[bool | None] = contextlib.nullcontext()

    def kv_bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return _C.kv_block_bytes(self._num_layers, self._spec.kv_heads, self._spec.head_dim, self._kv_int8)

    def allocate_kv(self, num_blocks: int) -> None:
        """Create the KV cache (reserved, backed when touched) and the block pool. Raises `OutOfMemory`."""
        try:
            self.program.allocate_kv(
                self._num_layers, num_blocks, self._spec.kv_heads, self._spec.head_dim, self._kv_int8
            )
        except MemoryError as error:
            need = self.kv_bytes_per_block() * num_blocks
            raise OutOfMemory(f"a KV cache of {num_blocks} blocks ({need} bytes) does not fit into memory") from error
        self.block_pool = _C.BlockPool(num_blocks, BLOCK_SIZE, int.from_bytes(os.urandom(16)))

    def attach_progress(self, cell: _C.ProgressCell) -> None:
        """Let the program count nodes in `cell` and obey its abort flag."""
        self.program.attach_progress(cell)

    def attach_lease(self, lease: _C.StepLease) -> None:
        """Compute each step under `lease`, or without it where it is not to be had."""
        self._lease = lease

    def launch(self, step: StepInput) -> None:
        """Run the step in line, after the copies and the zeroing that the block pool has pending.

        Raises `ValueError` for contradicting arrays, `InterruptedError` when aborted; what was pending is then pending
        still, and the step can be run again.
        """
        assert self.block_pool is not None, "allocate_kv comes first"
        num_rows = len(step.logit_rows)
        num_top = max(0, int(step.num_logprobs.max(initial=0)))
        output = StepOutput(
            token_ids=np.empty(num_rows, np.int32),
            logprobs=np.empty(num_rows, np.float32),
            ranks=np.empty(num_rows, np.int32),
            top_ids=np.full((num_rows, num_top), -1, np.int32),
            top_logprobs=np.full((num_rows, num_top), np.nan, np.float32),
        )
        with self._lease:
            finished = self.program.run(
                self.block_pool, step.token_ids, step.positions, step.query_start, step.seq_lens, step.block_tables,
                step.logit_rows, step.targets, step.temperature, step.top_k, step.top_p, step.min_p, step.seed,
                step.sample_position, step.num_logprobs,
                output.token_ids, output.logprobs, output.ranks, output.top_ids, output.top_logprobs,
                states=cast("Sequence[_C.SamplingState | None]", step.states),
                mask_rows=step.mask_rows, masks=step.masks,
            )  # fmt: skip
        if not finished:
            raise InterruptedError("the step was aborted")
        self._output = output

    def collect(self) -> StepOutput:
        """The output of the step launched last."""
        assert self._output is not None, "collect without launch"
        return self._output


def build(config: ModelConfig, forward: Forward, executor_config: ExecutorConfig, *, progress: Progress) -> CpuExecutor:
    """Record, compile and pack a network.

    Raises `CheckpointError` for a network this executor cannot run, `InvalidRequest` for a bad option.
    """
    del config  # the forward says it all
    if executor_config.block_size != BLOCK_SIZE:
        raise InvalidRequest(f"block_size: the CPU executor has blocks of {BLOCK_SIZE} tokens", param="block_size")
    if executor_config.kv_cache_dtype not in ("bf16", "int8"):
        raise InvalidRequest("kv_cache_dtype: the CPU executor's cache is bf16 or int8", param="kv_cache_dtype")
    tape = TapeBuilder()
    forward(tape)
    plan = Compiler(tape.ops, executor_config.exact).run()
    try:
        program = _C.Program(
            executor_config.isa or os.environ.get("LLMSERVE_CPU_ISA", ""),
            executor_config.num_threads,
            max_num_tokens=executor_config.max_num_tokens,
            max_num_seqs=executor_config.max_num_seqs,
            max_logit_rows=executor_config.max_logit_rows,
            max_position=executor_config.max_model_len,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    emitter = Emitter(program, executor_config, exact=executor_config.exact)
    emitter.place(plan.nodes)
    weights = emitter.load(plan.nodes, progress)
    for node in plan.nodes:
        emitter.add(node)
    kv_int8 = executor_config.kv_cache_dtype == "int8"
    return CpuExecutor(program, plan.attention, weights, weight_bytes=emitter.weight_bytes, kv_int8=kv_int8)

"""The CUDA executor: a network lowered once, then one program run or one graph replay per step.

`launch` only enqueues: block copies, changes of the block tables, the program, sampling, and the copy of what was
sampled to the host, which `collect` waits for. Invariants: the paged cache is read and written by the block pool's
tables; nothing but `collect` waits for the device; what a step can need was set aside before requests come.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve import _C
from llmserve.config import ExecutorConfig, ModelConfig
from llmserve.errors import InvalidRequest
from llmserve.ops import Forward, Progress
from llmserve.ops.cuda.graphs import DecodeGraphs
from llmserve.ops.cuda.launchers import Launchers, of_library
from llmserve.ops.cuda.library import open_library
from llmserve.ops.cuda.lowering import Lowering
from llmserve.ops.cuda.memory import MemoryProfile, largest_step, measure, out_of_memory
from llmserve.ops.cuda.offload import HostBlocks, host_blocks_in
from llmserve.ops.cuda.paged_cache import DTYPES, PagedCache, check_block_size
from llmserve.ops.cuda.projections import ProjectionLoader
from llmserve.ops.cuda.sampling import Sampling
from llmserve.ops.cuda.step import AttentionShape, StepBuilder
from llmserve.ops.cuda.upload import send_once
from llmserve.ops.cuda.weights import DeviceWeights
from llmserve.ops.protocol import StepInput, StepOutput
from llmserve.ops.reference import empty_step
from llmserve.ops.tape import TapeBuilder
from llmserve.types import WeightsOrigin


class CudaExecutor:
    """A network on one GPU. `block_pool` appears with `allocate_kv`."""

    isa = "cuda"
    runs_ahead = True
    num_threads = 1
    weights_origin: WeightsOrigin = "memory"
    image_path = ""

    def __init__(self, forward: Forward, config: ExecutorConfig, launchers: Launchers, *, progress: Progress) -> None:
        self.block_pool: _C.BlockPool | None = None
        self._config = config
        self._launchers = launchers
        self._cache_addresses: dict[int, Tensor] = {}
        self._host: HostBlocks | None = None
        self._progress: _C.ProgressCell | None = None
        tape = TapeBuilder()
        forward(tape)
        weights = DeviceWeights(launchers.device, progress)
        lowering = Lowering(
            tape.ops,
            weights,
            ProjectionLoader(weights, deterministic=config.deterministic),
            max_positions=config.max_model_len,
            deterministic=config.deterministic,
            cache_dtype=DTYPES[config.kv_cache_dtype],
        )
        with torch.inference_mode(), out_of_memory("the weights do not fit on the GPU"):
            self.program = lowering.run()
        weights.finish()
        self.weight_bytes = weights.num_bytes
        specs = [op.spec for op in lowering.attention]
        takes_kernels = all(lowering.takes_kernels(spec) for spec in specs)
        first = next((spec for spec in specs if lowering.takes_kernels(spec)), specs[0])
        shape = AttentionShape(
            first.heads,
            first.kv_heads,
            first.head_dim,
            windows=tuple(sorted({spec.window for spec in specs})),
            has_decodes=takes_kernels,
        )
        shapes = {op.layer: (op.spec.kv_heads, op.spec.head_dim) for op in lowering.attention}
        self.cache = PagedCache(DTYPES[config.kv_cache_dtype], config.block_size, shapes)
        self.builder = StepBuilder(launchers, config, shape, self.cache.layers)
        self._sampling = Sampling(launchers, config, lowering.vocab_size)
        self._has_graphs = launchers.device.type == "cuda" and takes_kernels
        self.graphs = DecodeGraphs(self.program.run, config.max_num_seqs, lowering.vocab_size)
        self._memory: MemoryProfile | None = None

    def free_bytes(self) -> int:
        """What the KV cache may take of the GPU's memory, beside weights and the largest step."""
        if self._memory is None:
            with out_of_memory(
                "the largest step does not fit on the GPU beside the weights; lower max_num_batched_tokens"
            ):
                self._memory = measure(self._run_largest_step, self.builder.device)
        return self._memory.free_bytes

    def kv_bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.cache.bytes_per_block()

    def allocate_kv(self, num_blocks: int) -> None:
        """Create the KV cache, its part on the host and the block pool, and the graphs of steps on them.

        Raises `OutOfMemory`.
        """
        self._allocate(num_blocks, host_blocks_in(self._config.host_kv_cache_bytes, self.kv_bytes_per_block()))
        if self._has_graphs:
            with torch.inference_mode():
                self.graphs.capture(lambda size: self.builder.build(empty_step(), pad_to=size))

    def _allocate(self, num_blocks: int, num_host_blocks: int) -> None:
        self.graphs.clear()  # they read the cache that was
        self.cache.allocate(num_blocks, self.builder.device)
        self._cache_addresses = self.cache.addresses()
        self._host = HostBlocks([*self.cache.tensors()], num_host_blocks) if num_host_blocks else None
        key = int.from_bytes(os.urandom(16))
        self.block_pool = _C.BlockPool(num_blocks, self._config.block_size, key, num_host_blocks)

    def attach_progress(self, cell: _C.ProgressCell) -> None:
        """Count steps in `cell`: each when it is launched and when it is done. A step that runs is not aborted."""
        self._progress = cell

    def launch(self, step: StepInput) -> None:
        """Enqueue the step, after the block copies that the pool has pending."""
        assert self.block_pool is not None, "allocate_kv comes first"
        self._bump()
        with torch.inference_mode():
            inputs = self._sampling.send(step)
            if self._host is not None:
                self._host.apply(self.block_pool.take_transfers())
            self._copy_blocks(self.block_pool.take_copies())
            self.builder.sync_tables(self.block_pool, step.block_tables.tolist())
            self._sampling.start(self._logits(step), step, inputs)

    def collect(self) -> StepOutput:
        """Wait for the oldest step that was launched and not collected."""
        output = self._sampling.finish()
        self._bump()
        return output

    def _bump(self) -> None:
        if self._progress is not None:
            self._progress.bump()

    def _copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Source to target in every cache tensor; the pool's copies may be done in any order."""
        if not pairs:
            return
        arrays: list[NDArray[Any]] = [np.array(pairs, np.int64), np.array([len(pairs)], np.int32)]
        where, count = send_once(arrays, self.builder.device)
        for block_bytes, tensors in self._cache_addresses.items():
            self._launchers.copy_blocks(where, count, tensors, block_bytes=block_bytes)

    def _run_largest_step(self) -> int:
        """With a cache of its own, which is given back; its bytes."""
        tokens, longest = self._config.max_num_tokens, self._config.max_model_len
        lengths = [min(longest, tokens - first) for first in range(0, tokens, longest)][: self._config.max_num_seqs]
        self._allocate(sum(-(-length // self._config.block_size) for length in lengths), num_host_blocks=0)
        assert self.block_pool is not None, "it was just made"
        handles = [self.block_pool.create() for _ in lengths]
        self.block_pool.reserve(handles, lengths)
        self.launch(largest_step(lengths, handles, max_logit_rows=self._config.max_logit_rows))
        self.collect()
        cache_bytes = self.kv_bytes_per_block() * self.block_pool.num_blocks
        self.block_pool = None
        self.cache.layers.clear()
        return cache_bytes

    def _logits(self, step: StepInput) -> Tensor:
        num_rows = len(step.logit_rows)
        is_decode = num_rows == len(step.token_ids) == len(step.seq_lens)
        size = self.graphs.size_for(num_rows) if is_decode and self.builder.fits_graph(step.seq_lens) else 0
        previous = self._sampling.last_token_ids if len(step.previous_rows) else None
        device_step = self.builder.build(step, previous, pad_to=size)
        return self.graphs.replay(device_step)[:num_rows] if size else self.program.run(device_step)


def build(
    config: ModelConfig,
    forward: Forward,
    executor_config: ExecutorConfig,
    *,
    progress: Progress,
    launchers: Launchers | None = None,
) -> CudaExecutor:
    """Bring the weights to the GPU. Raises `ExtensionNotBuilt`, `InvalidRequest` for an option that CUDA lacks."""
    del config  # the forward says it all
    if executor_config.exact:
        raise InvalidRequest("exact: on CUDA weights and activations are bfloat16", param="exact")
    check_block_size(executor_config.block_size)
    return CudaExecutor(forward, executor_config, launchers or of_library(open_library()), progress=progress)

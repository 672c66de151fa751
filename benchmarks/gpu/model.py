"""Whole networks on the GPU: Llama-3-8B's shape with random weights, decode, prefill, and requests through the engine.

Each figure stands beside its bound: bytes that must be read over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from benchmarks.gpu import synthetic
from benchmarks.gpu.timing import Ceilings
from llmserve.config import ExecutorConfig, ModelConfig
from llmserve.engine.engine import Engine
from llmserve.engine.kv_cache import PagedExecutor
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.ops import cuda
from llmserve.ops.cuda.executor import CudaExecutor
from llmserve.ops.protocol import StepInput
from llmserve.types import EngineInfo, Request, SamplingParams


def step_of(handles: Sequence[int], first: int, count: int, *, rows_per_sequence: int = 1) -> StepInput:
    """`count` tokens from position `first` on of each sequence, greedy, the last rows of each with logits."""
    num, ends = len(handles), np.arange(1, len(handles) + 1) * count
    rows = (ends[:, None] - np.arange(rows_per_sequence, 0, -1)).reshape(-1).astype(np.int32)
    zeros = np.zeros(len(rows), np.float32)
    return StepInput(
        token_ids=np.full(num * count, 17, np.int32),
        positions=np.tile(np.arange(first, first + count, dtype=np.int32), num),
        query_start=np.concatenate(([0], ends)).astype(np.int32),
        seq_lens=np.full(num, first + count, np.int32),
        block_tables=np.asarray(handles, np.int64),
        logit_rows=rows,
        targets=np.full(len(rows), -1, np.int32),
        temperature=zeros,
        top_k=np.zeros(len(rows), np.int32),
        top_p=zeros + 1,
        min_p=zeros,
        seed=np.zeros(len(rows), np.uint64),
        sample_position=np.full(len(rows), first + count, np.int64),
        num_logprobs=np.full(len(rows), -1, np.int32),
    )


class Bench:
    """One network loaded."""

    def __init__(self, config: ModelConfig, storage: synthetic.Storage, ceilings: Ceilings, **options: Any) -> None:
        self.config, self.ceilings = config, ceilings
        self.weight_bytes = synthetic.matrix_bytes(config, storage)
        limits = ExecutorConfig(
            max_num_tokens=8192, max_num_seqs=256, max_logit_rows=256, max_model_len=4096, **options
        )
        started = time.perf_counter()
        self.executor: CudaExecutor = cuda.build(
            config, synthetic.network(config, storage), limits, progress=lambda what, done, total: None
        )
        self.load_s = time.perf_counter() - started
        free = self.executor.free_bytes()
        self.num_blocks = min(int(free * 0.9) // self.executor.kv_bytes_per_block(), 256 * 2048 // 16)
        self.executor.allocate_kv(self.num_blocks)

    def sequences(self, count: int, num_tokens: int) -> list[int]:
        """Handles whose tables cover so many tokens."""
        pool = self.executor.block_pool
        assert pool is not None
        handles = [pool.create() for _ in range(count)]
        assert pool.reserve(handles, [num_tokens] * count) == count, "the KV cache is too small for this case"
        return handles

    def release(self, handles: Sequence[int]) -> None:
        """Give the blocks back."""
        assert self.executor.block_pool is not None
        for handle in handles:
            self.executor.block_pool.release(handle)

    def run(self, step: StepInput) -> None:
        """One step to its end."""
        self.executor.launch(step)
        self.executor.collect()

    def decode(self, batch: int, context: int, *, steps: int = 64) -> dict[str, Any]:
        """Tokens a second of `batch` sequences from `context` tokens on, time of a step and of its graph alone."""
        handles = self.sequences(batch, context + steps + 8)
        self.run(step_of(handles, context, 1))
        self.executor.launch(step_of(handles, context + 1, 1))
        began = time.perf_counter()
        for index in range(steps):  # as the engine does: each step is launched before the last is collected
            step = step_of(handles, context + 2 + index, 1)
            step.previous_rows = np.arange(batch, dtype=np.int32)
            self.executor.launch(step)
            self.executor.collect()
        wall_s = time.perf_counter() - began
        self.executor.collect()
        self.release(handles)
        step_s, graph_s = wall_s / steps, self.graph_seconds(batch)
        kv_heads, head_dim, layers = self.config.num_kv_heads, self.config.head_dim, self.config.num_layers
        kv_bytes = batch * context * kv_heads * head_dim * layers * 4
        bound = batch * self.ceilings.copy_bytes_s / (self.weight_bytes + kv_bytes)
        rate = batch / step_s
        return {
            "batch": batch, "context": context, "tokens_s": rate, "bound_tokens_s": bound, "share": rate / bound,
            "step_ms": 1000 * step_s, "graph_ms": 1000 * graph_s, "gap": 1 - graph_s / step_s,
        }  # fmt: skip

    def graph_seconds(self, batch: int, *, rounds: int = 20) -> float:
        """Of one replay of the last step of so many sequences, sampling left out."""
        size = self.executor.graphs.size_for(batch)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            self.executor.graphs.replay_size(size)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000 / rounds

    def prefill(self, num_tokens: int, *, repeats: int = 7) -> dict[str, Any]:
        """Milliseconds from a prompt to its first token."""
        times = []
        for _ in range(repeats):
            handles = self.sequences(1, num_tokens)
            began = time.perf_counter()
            self.run(step_of(handles, 0, num_tokens))
            times.append(time.perf_counter() - began)
            self.release(handles)
        flops = 2 * num_tokens * self.weight_bytes / 2
        best = float(np.median(times))
        return {"tokens": num_tokens, "ms": 1000 * best, "bound_ms": 1000 * flops / self.ceilings.bf16_flops}

    def requests(self, count: int, num_prompt: int, num_output: int) -> dict[str, Any]:
        """Whole requests through the scheduler: output tokens a second."""
        scheduler = SchedulerConfig(
            max_num_tokens=8192, max_num_seqs=256, max_logit_rows=256, max_num_waiting=0, itl_target_ms=0,
            enable_prefix_cache=False, max_draft_tokens=0,
        )  # fmt: skip
        info = EngineInfo(
            model_path="", architecture="llama", vocab_size=self.config.vocab_size, max_model_len=4096,
            max_num_seqs=256, num_blocks=self.num_blocks, block_size=16, kv_cache_bytes=0, weight_bytes=0,
            device="cuda", isa="cuda", num_threads=1, load_s=self.load_s,
        )  # fmt: skip
        engine = Engine(cast(PagedExecutor, self.executor), scheduler, info)
        random = np.random.default_rng(2)
        for index in range(count):
            prompt = random.integers(0, self.config.vocab_size, num_prompt).tolist()
            sampling = SamplingParams(max_tokens=num_output, temperature=0.0)
            engine.submit(Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        began, tokens = time.perf_counter(), 0
        while engine.has_work:
            tokens += sum(len(output.token_ids) for output in engine.step())
        wall_s = time.perf_counter() - began
        return {"requests": count, "prompt": num_prompt, "output": num_output, "output_tokens_s": tokens / wall_s}


def run(part: str, ceilings: Ceilings) -> dict[str, Any]:
    """`bf16` or `i4_g128` weights, or `deterministic`: bf16 with results that do not depend on the batch."""
    if part == "deterministic":
        bench = Bench(synthetic.LLAMA3_8B, "bf16", ceilings, deterministic=True)
        return {"decode": [bench.decode(1, 128), bench.decode(256, 1024)], "prefill": [bench.prefill(1024)]}
    bench = Bench(synthetic.LLAMA3_8B, "bf16" if part == "bf16" else "i4_g128", ceilings)
    return {
        "load_s": bench.load_s,
        "decode": [bench.decode(1, 128), bench.decode(8, 128), bench.decode(64, 1024), bench.decode(256, 1024)],
        "prefill": [bench.prefill(1024), bench.prefill(4096)],
        "requests": bench.requests(512, 1024, 256),
    }

"""How much GPU memory a step takes at most: measured once, by running the largest one before any request comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from llmserve.errors import OutOfMemory
from llmserve.ops.protocol import StepInput

GRAPH_BYTES: Final = 512 << 20
"""Set aside for the graphs of decode steps and what libraries take when they are first called."""


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Bytes of the GPU's memory."""

    step_bytes: int
    """Most that a step's activations take."""
    free_bytes: int
    """Left for the KV cache beside them."""


@contextmanager
def out_of_memory(message: str) -> Iterator[None]:
    """Turns torch's error into `OutOfMemory`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(message) from error


def measure(run: Callable[[], int], device: torch.device) -> MemoryProfile:
    """Run the largest step, and say what it took and what is left. `run` returns what a KV cache of its own took."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    cache_bytes = run()
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - before - cache_bytes
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return MemoryProfile(step_bytes, max(0, free - step_bytes - GRAPH_BYTES))


def largest_step(lengths: Sequence[int], handles: Sequence[int], *, max_logit_rows: int) -> StepInput:
    """Whole prompts, with as many rows to sample as a step can have."""
    total = sum(lengths)
    rows = min(max_logit_rows, total)
    return StepInput(
        token_ids=np.zeros(total, np.int32),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        query_start=np.cumsum([0, *lengths]).astype(np.int32),
        seq_lens=np.array(lengths, np.int32),
        block_tables=np.array(handles, np.int64),
        logit_rows=np.arange(total - rows, total, dtype=np.int32),
        targets=np.full(rows, -1, np.int32),
        temperature=np.ones(rows, np.float32),
        top_k=np.full(rows, 50, np.int32),
        top_p=np.full(rows, 0.9, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros(rows, np.uint64),
        sample_position=np.zeros(rows, np.int64),
        num_logprobs=np.full(rows, 20, np.int32),
    )

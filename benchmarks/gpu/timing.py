"""Times on a GPU, and what the GPU can do at best: measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

ROTATED_BYTES: Final = 256 << 20
"""Operands of repeated calls go over this much memory at least, so that the L2 cache does not help."""
_REPEATS: Final = 5


def seconds(calls: Sequence[Callable[[], object]], *, min_s: float = 0.02) -> float:
    """Of one call, where each of `calls` does the same on memory of its own: median of runs over all of them.

    The calls are captured into one CUDA graph: what Python and the driver take is not counted.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _elapsed(graph.replay, 1)
    rounds = max(1, round(min_s / max(once, 1e-6)))
    return statistics.median(_elapsed(graph.replay, rounds) for _ in range(_REPEATS)) / len(calls)


def eager_seconds(call: Callable[[], object], *, rounds: int = 20) -> float:
    """Of one call as it is made, Python and launches included."""
    call()
    return statistics.median(_elapsed(call, rounds) for _ in range(_REPEATS))


def _elapsed(call: Callable[[], object], rounds: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / rounds


def num_copies(bytes_of_one: int) -> int:
    """Operands to rotate over."""
    return max(1, -(-ROTATED_BYTES // max(1, bytes_of_one)))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of this GPU."""

    device: str
    copy_bytes_s: float
    """Read and written."""
    bf16_flops: float


def ceilings() -> Ceilings:
    """Copy of 4 GB, product of 8192 x 8192 matrices on random data."""
    source = torch.empty(2 << 30, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds([partial(target.copy_, source)])
    del source, target
    a, b = (torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = seconds([lambda: torch.mm(a, b)])
    return Ceilings(torch.cuda.get_device_name(), bandwidth, 2 * 8192**3 / product)

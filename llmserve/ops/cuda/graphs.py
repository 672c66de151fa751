"""CUDA graphs of decode steps, one for each padded number of sequences.

A graph reads the addresses it was captured with. Steps padded to the same size are built at the same addresses
(`step.StepBuilder`), so a replay needs nothing but the new step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from llmserve.ops.cuda.step import DeviceStep

_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that steps are padded to, ascending; above the last one steps run without a graph."""
    return [size for size in _SIZES if size <= max_num_seqs]


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor


@dataclass(slots=True)
class DecodeGraphs:
    """The graphs captured so far. `run` is what they hold: a program on one step."""

    run: Callable[[DeviceStep], Tensor]
    sizes: Sequence[int]
    _graphs: dict[int, _Graph] = field(default_factory=dict)
    _pool: tuple[int, int] | None = None

    def size_for(self, num_seqs: int) -> int:
        """The size a step of decodes is padded to; 0: it runs without a graph."""
        return next((size for size in self.sizes if size >= num_seqs), 0)

    def replay(self, step: DeviceStep) -> Tensor:
        """Logits of a step of exactly one size; they are overwritten by the next replay of it.

        The first step of a size is captured, which its own run precedes: libraries choose their kernels there.
        """
        size = step.num_tokens
        if size not in self._graphs:
            self._graphs[size] = self._capture(step)
        captured = self._graphs[size]
        captured.graph.replay()
        return captured.logits

    def _capture(self, step: DeviceStep) -> _Graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run(step)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self.run(step)
        self._pool = self._pool or graph.pool()
        return _Graph(graph, logits)

"""CUDA graphs of decode steps, one for each padded number of sequences.

A graph reads the addresses it was captured with. Steps padded to the same size are built at the same addresses
(`step.StepBuilder`), so a replay needs nothing but the new step. Graphs are captured at once, the largest first, so
that they share memory; what they leave their logits in is one buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from llmserve.ops.cuda.step import DeviceStep

_log = logging.getLogger(__name__)
_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that steps are padded to, ascending; above the last one steps run without a graph."""
    sizes = [size for size in _SIZES if size < max_num_seqs]
    return [*sizes, min(max_num_seqs, _SIZES[-1])]


@dataclass(slots=True)
class DecodeGraphs:
    """The graphs of a program. `run` is what they hold: logits of one step."""

    run: Callable[[DeviceStep], Tensor]
    max_num_seqs: int
    vocab_size: int
    _graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)
    _logits: Tensor | None = None

    def size_for(self, num_seqs: int) -> int:
        """The size a step of decodes is padded to; 0: it runs without a graph."""
        return min((size for size in self._graphs if size >= num_seqs), default=0)

    def replay(self, step: DeviceStep) -> Tensor:
        """Logits of a step of exactly one size; they are overwritten by the next replay."""
        return self.replay_size(step.num_tokens)

    def replay_size(self, size: int) -> Tensor:
        """Replay a size on whatever lies where its steps do."""
        self._graphs[size].replay()
        assert self._logits is not None, "capture has made it"
        return self._logits[:size]

    def clear(self) -> None:
        """Forget all: what they read or wrote is no more."""
        self._graphs.clear()
        self._logits = None

    def capture(self, empty_step: Callable[[int], DeviceStep]) -> None:
        """Capture every size, from steps of padding alone. A size that fails runs without a graph."""
        self.clear()
        sizes = graph_sizes(self.max_num_seqs)
        stream, pool = torch.cuda.Stream(), None
        logits = torch.empty((sizes[-1], self.vocab_size), device=f"cuda:{torch.cuda.current_device()}")
        for size in reversed(sizes):
            try:
                graph = self._capture_one(empty_step(size), stream, pool, logits[:size])
            except RuntimeError:
                _log.exception("decode steps of %d sequences run without a CUDA graph", size)
                continue
            self._graphs[size] = graph
            pool = pool or graph.pool()
        self._logits = logits

    def _capture_one(
        self, step: DeviceStep, stream: torch.cuda.Stream, pool: tuple[int, int] | None, logits: Tensor
    ) -> torch.cuda.CUDAGraph:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(step)  # libraries choose their kernels, and take their memory, where it can be waited for
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits.copy_(self.run(step))
        return graph

"""The CUDA executor: torch tensors on one GPU, kernels of our own (`csrc/cuda`) behind the launchers."""

from __future__ import annotations

from llmserve.ops.cuda.executor import build

__all__ = ["build"]

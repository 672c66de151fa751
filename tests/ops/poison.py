"""Networks in which one token is poison: its embedding holds a value that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Final, cast

import numpy as np

from llmserve import ops
from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.dequantize import dequantize
from llmserve.config import ExecutorConfig
from llmserve.engine.kv_cache import PagedExecutor
from llmserve.models import llama
from llmserve.types import CheckpointTensor

POISON: Final = 7
"""The token."""


def poisoned_executor(path: Path, config: ExecutorConfig, value: float, *, device: str = "cpu") -> PagedExecutor:
    """The checkpoint's network with one channel of the token's embedding set to `value`. It must have a head."""
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tie_word_embeddings, "a poisoned head would poison every row"
    embed = dequantize(checkpoint.tensors["embed"]).copy()
    embed[POISON, 5] = value
    tensor = CheckpointTensor("embed", "f32", embed.shape, memoryview(np.ascontiguousarray(embed).tobytes()))
    forward = llama.build(checkpoint.config, {**checkpoint.tensors, "embed": tensor})
    built = ops.load(device).build(checkpoint.config, forward, config, progress=lambda what, done, total: None)
    return cast(PagedExecutor, built)

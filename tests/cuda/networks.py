"""Tiny networks on the CUDA executor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmserve.checkpoints import open_checkpoint
from llmserve.config import ExecutorConfig
from llmserve.models.catalog import load_model
from tests.tiny import checkpoints
from tests.tiny.models import BLOCK_MODELS, MODELS

if TYPE_CHECKING:
    from llmserve.ops.cuda.executor import CudaExecutor
    from llmserve.ops.cuda.launchers import Launchers

NUM_BLOCKS = 64


def load(name: str, launchers: Launchers, folder: Path, **options: Any) -> CudaExecutor:
    """One of the networks of `tests.tiny`, with a KV cache."""
    from llmserve.ops.cuda.executor import build

    checkpoint = open_checkpoint(checkpoints.write((MODELS | BLOCK_MODELS)[name], folder))
    limits = {"max_num_tokens": 64, "max_num_seqs": 8, "max_logit_rows": 64, "max_model_len": 128}
    config = ExecutorConfig(**{**limits, **options})
    executor = build(
        checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None, launchers=launchers
    )
    executor.allocate_kv(NUM_BLOCKS)
    return executor

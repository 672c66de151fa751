"""Which model file runs which architecture: one line each.

Model files are imported when their architecture is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

from llmserve.checkpoints import Checkpoint
from llmserve.errors import CheckpointError
from llmserve.ops.protocol import Ops, Value

MODELS: Final = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
}
"""`ModelConfig.architecture` → module of `llmserve.models` with a function `build(config, tensors)`."""


def load_model(checkpoint: Checkpoint) -> Callable[[Ops], Value]:
    """The forward pass of the checkpoint's network, bound to its tensors. Raises `CheckpointError`."""
    architecture = checkpoint.config.architecture
    if architecture not in MODELS:
        raise CheckpointError(f"architecture {architecture!r} is not supported; supported: {', '.join(MODELS)}")
    module = import_module(f"llmserve.models.{MODELS[architecture]}")
    try:
        forward: Callable[[Ops], Value] = module.build(checkpoint.config, checkpoint.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    return forward

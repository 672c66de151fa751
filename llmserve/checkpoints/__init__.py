"""File formats of model checkpoints: what is in them, by canonical name, without copying.

`open_checkpoint` is the engine's side (configuration, tensors), `open_text` the frontend's (vocabulary, templates).
"""

from __future__ import annotations

from llmserve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from llmserve.checkpoints.text import open_text
from llmserve.checkpoints.text_assets import TextAssets

__all__ = ["Checkpoint", "TextAssets", "open_checkpoint", "open_text"]

"""Whether and where packed weights are kept: configuration and environment turned into an `ImageConfig`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

from llmserve.checkpoints import Checkpoint
from llmserve.checkpoints.store import Store
from llmserve.config import EngineConfig, ImageConfig
from llmserve.errors import InvalidRequest

VARIABLE: Final = "LLMSERVE_PACKED_CACHE_GIB"
DEFAULT_GIB: Final = 64.0


def image_folder() -> Path:
    """The folder of all images."""
    return Store().home / "packed"


def max_image_bytes(config: EngineConfig) -> int:
    """Bound of the folder; 0: no images. Raises `InvalidRequest` for a variable that is no number."""
    if config.packed_cache_bytes is not None:
        return config.packed_cache_bytes
    text = os.environ.get(VARIABLE, "")
    try:
        gib = float(text) if text else DEFAULT_GIB
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise InvalidRequest(f"{VARIABLE}: {text!r} is not a number of GiB", param=VARIABLE)
    return int(gib * 1024**3)


def image_config(config: EngineConfig, checkpoint: Checkpoint) -> ImageConfig | None:
    """For the executor; None when images are switched off or the checkpoint is far too small for one."""
    max_bytes = max_image_bytes(config)
    if max_bytes == 0 or 4 * checkpoint.total_bytes < config.packed_cache_min_bytes:
        return None  # packing widens no weight that much: bf16 to f32 doubles it
    return ImageConfig(
        folder=image_folder(),
        checkpoint_id=checkpoint.identity,
        max_bytes=max_bytes,
        min_bytes=config.packed_cache_min_bytes,
    )

"""A process that loads a checkpoint with an image, says what it found, and stays until its input has a line."""

from __future__ import annotations

import sys
from pathlib import Path

from llmserve.config import ImageConfig
from tests.ops.test_images import Loaded, digest

if __name__ == "__main__":
    images = ImageConfig(folder=Path(sys.argv[2]), checkpoint_id="one", max_bytes=1 << 30)
    loaded = Loaded(Path(sys.argv[1]), images)
    sys.stdout.write(f"{loaded.origin} {digest(loaded)}\n")
    sys.stdout.flush()
    sys.stdin.readline()

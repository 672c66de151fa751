"""What holds for all tests."""

from __future__ import annotations

import os

# Tests with large networks leave no images of their weights in the home of whoever runs them, nor do the processes they
# start. Tests of images set what they need themselves.
os.environ.setdefault("LLMSERVE_PACKED_CACHE_GIB", "0")

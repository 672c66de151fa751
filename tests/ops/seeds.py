"""Fresh random inputs in every run; `LLMSERVE_TEST_SEED` repeats one. Every assertion names its seed."""

from __future__ import annotations

import os


def fresh_seed() -> int:
    """A seed below 2**31."""
    chosen = os.environ.get("LLMSERVE_TEST_SEED")
    return int(chosen) if chosen else int.from_bytes(os.urandom(4), "little") % 2**31

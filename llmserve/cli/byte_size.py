"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re
from typing import Final

from llmserve.errors import InvalidRequest

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?(b?)\s*", re.IGNORECASE)
_STEPS: Final = ("", "k", "m", "g", "t")


def parse_byte_size(text: str, *, param: str) -> int:
    """`2GiB`, `512MiB`, `1.5G`, `4096` → bytes. `GB` counts in thousands; `G` and `GiB` in 1024s.

    Raises `InvalidRequest` that names `param`.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{param}: {text!r} is not a size; write e.g. 2GiB, 512MiB or 4096", param=param)
    number, step, binary, unit = match.groups(default="")
    base = 1000 if unit and not binary else 1024
    return int(float(number) * base ** _STEPS.index(step.lower()))


def format_bytes(num_bytes: float) -> str:
    """`92 MiB`, `1.2 GiB`: three digits at most, in 1024s."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{value:.0f} {unit}"

"""Typed look-ups in metadata that came from a file. A missing or ill-typed entry is a one-line `CheckpointError`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llmserve.errors import CheckpointError

MAX_SIZE: Final = 1 << 31
"""No dimension of a network is larger; larger values are corrupt."""


class Fields:
    """A mapping with the name of its file, for messages. Entries that are None count as missing."""

    __slots__ = ("values", "where")

    def __init__(self, values: Mapping[str, Any], where: Path | str) -> None:
        self.values = values
        self.where = where

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_SIZE:
            raise self.fail(f"{key} is {value!r:.80}, not a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(f"{key} is {value!r:.80}, not a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(f"{key} is {value!r:.80}, not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(f"{key} is missing")
        if not isinstance(value, str):
            raise self.fail(f"{key} is {value!r:.80}, not a string")
        return value

    def array(self, key: str, kind: type) -> list[Any]:
        """A list of one element type; empty when missing."""
        values = self.values.get(key)
        if values is None:
            return []
        # Arrays of GGUF have one element type, so the first entry speaks for all.
        if not isinstance(values, list) or (values and not isinstance(values[0], kind)):
            raise self.fail(f"{key} is not a list of {kind.__name__}")
        return values

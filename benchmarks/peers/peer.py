"""What an engine must offer to be compared; llmserve is one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from benchmarks.peers.quiet import Quiet
from llmserve.tools.bench_load import Load

LEVELS: Final = (1, 8, 32)
"""Streams over HTTP, and batch sizes without."""
PREFILL_REPETITIONS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for all engines."""

    num_threads: int
    load: Load = field(default_factory=Load)
    quiet: Quiet = field(default_factory=Quiet)
    levels: Sequence[int] = LEVELS
    prefill_tokens: int = 512
    """Of a prompt without HTTP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How an engine's OpenAI-compatible server is started."""

    command: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of its process, besides those of this one."""
    timeout_s: float = 120.0
    """Until it must answer."""


class Bench(Protocol):
    """An engine without HTTP, ready to be measured."""

    def prefill(self) -> float:
        """tokens/s over prompts of `prefill_tokens` tokens, one after another; the median."""
        ...

    def decode(self, batch: int) -> float:
        """tokens/s of `batch` sequences that decode together."""
        ...


class Peer(Protocol):
    """One engine."""

    @property
    def name(self) -> str:
        """As tables call it."""
        ...

    @property
    def given(self) -> str:
        """What it computes with where that is not the file itself; else empty."""
        ...

    def version(self) -> str: ...

    def server(self, model: Path, port: int) -> ServerCommand | None:
        """None: it is not measured over HTTP."""
        ...

    def alone(self, model: Path) -> AbstractContextManager[Bench] | None:
        """Open it for measurements without HTTP; None: it has none."""
        ...

"""The result file of a comparison: one record for each measurement, and what all of them belong to."""

from __future__ import annotations

import hashlib
import statistics
from pathlib import Path

import msgspec

from llmserve.tools.bench_host import Host
from llmserve.tools.bench_stats import LevelReport

OURS = "llmserve"
RESULTS = Path(__file__).resolve().parent.parent / "results"


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file that all engines load."""

    name: str
    sha256: str
    num_bytes: int

    @classmethod
    def of(cls, path: Path) -> ModelFile:
        content = path.read_bytes()
        return cls(name=path.name, sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One of the compared."""

    name: str
    version: str
    command: str
    """Of its server; paths left out. Empty: it was not measured over HTTP."""
    given: str = ""
    """What it computes with where that is not the file itself."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One level of a closed loop over HTTP."""

    engine: str
    file: str = ""
    """Name of the model's file; empty: the comparison's `model`."""
    round: int
    others_cores: float
    """Cores that other processes kept busy meanwhile."""
    level: LevelReport


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement without HTTP."""

    engine: str
    file: str = ""
    """Name of the model's file; empty: the comparison's `model`."""
    round: int
    others_cores: float
    what: str
    """`prefill 512`, `decode B=8`."""
    tokens_per_s: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A whole result file."""

    host: Host
    model: ModelFile
    """The file that is compared first, and in the short table."""
    other_files: list[ModelFile] = []
    """The same network in other weight types."""
    num_threads: int
    prompt_tokens: int
    output_tokens: int
    max_others_cores: float
    """A measurement was repeated while others took more."""
    engines: list[Engine]
    served: list[Served]
    alone: list[Alone]

    @property
    def peers(self) -> list[str]:
        """Names of the engines but ours, in the order in which tables have them."""
        return [engine.name for engine in self.engines if engine.name != OURS]

    def is_about(self, record: Served | Alone, file: str) -> bool:
        """Whether a measurement was made on this file."""
        return (record.file or self.model.name) == file


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Repetitions of one figure."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Of one value at least."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))


def load_comparison(path: Path) -> Comparison:
    """Read a result file."""
    return msgspec.json.decode(path.read_bytes(), type=Comparison)


def save_json(value: msgspec.Struct, path: Path) -> None:
    """Write a result file, indented, so that changes can be read in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
